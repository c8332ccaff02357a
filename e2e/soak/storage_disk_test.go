package soak

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	_ "github.com/mattn/go-sqlite3" // the other program's driver
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/disk"
	"sendertrust/e2e/people"
	"sendertrust/e2e/postgres"
)

// fault is something that happens to a bot's database while people talk, and is over when begin returns.
type fault struct {
	name string
	// play makes it happen, for so long as it likes.
	play func(ctx context.Context) error
	// said is what the bot's log has to say about it; empty: nothing in particular.
	said string
}

// recovery is how long a bot may take to answer again after a fault.
const recovery = 20 * time.Second

// suffer plays faults, one after the other, each in the middle of something: a room that is made just then is a room like any other
// afterwards. It gives how long it took at most, after a fault, until a message was answered that was sent when it was over.
func (c *crowd) suffer(ctx context.Context, bot *botproc.Bot, faults []fault) (slowest time.Duration, err error) {
	host := c.strangers[0]
	for n, f := range faults {
		begun := make(chan error, 1)
		go func() { begun <- f.play(ctx) }()
		room, err := host.CreateRoom(ctx, true, bot.UserID)
		if err != nil {
			return slowest, fmt.Errorf("%s: %w", f.name, err)
		}
		if err = <-begun; err != nil {
			return slowest, fmt.Errorf("%s: %w", f.name, err)
		}
		over := time.Now()
		if err = c.askIn(ctx, room, host, bot); err != nil {
			return slowest, fmt.Errorf("%s, number %d: %w", f.name, n+1, err)
		}
		slowest = max(slowest, time.Since(over))
		if !bot.Running() {
			return slowest, fmt.Errorf("%s: the bot has ended:\n%s", f.name, bot.Tail(20))
		}
		if f.said != "" && len(bot.LogMentioning(f.said)) == 0 {
			return slowest, fmt.Errorf("%s: the log does not say %q", f.name, f.said)
		}
	}
	return slowest, nil
}

// askIn waits until the bot is in the room, and has answered a message there.
func (c *crowd) askIn(ctx context.Context, room id.RoomID, host *people.Person, bot *botproc.Bot) error {
	ctx, cancel := context.WithTimeoutCause(ctx, recovery, fmt.Errorf("no answer within %v", recovery))
	defer cancel()
	if err := host.WaitJoined(ctx, room, bot.UserID); err != nil {
		return err
	}
	eventID, err := host.Send(ctx, room, say("is it over?"))
	if err != nil {
		return err
	}
	c.ledger.note(message{eventID: eventID, roomID: room, reader: host, code: c.codeOf(host), sent: time.Now()})
	_, err = host.WaitForAnswerThat(ctx, eventID, func(answer people.Answer) bool { return answer.Sender == bot.UserID })
	return err
}

// endure has people talk to a bot while it suffers, and gives the line for the table.
func (c *crowd) endure(bot *botproc.Bot, what string, messages int, faults []fault) {
	t := c.t
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan struct{})
	var failed error
	var slowest time.Duration
	go func() {
		defer close(done)
		slowest, failed = c.suffer(ctx, bot, faults)
	}()
	ok(t, c.talk(ctx, messages, done))
	<-done
	if failed != nil {
		t.Error(failed)
	}
	r := result{part: "storage", what: what, tries: len(faults)}
	c.ledger.await(within(t, patience), bot.UserID)
	c.ledger.settle(within(t, patience), t, bot.UserID, c.codeOf)
	c.ledger.count(t, bot.UserID, &r)
	r.peak, _ = bot.PeakRSS()
	r.note = fmt.Sprintf("answers again within %s after each", slowest.Round(100*time.Millisecond))
	check(t, r)
}

// becomes gives faults of a disk that is in some state for a while: until the bot has said so. A refusal alone may have been one that SQLite
// tries again by itself, as when it copies what is in its log to the database.
func becomes(d *disk.Disk, bot *botproc.Bot, state disk.State, name, said string, longest time.Duration, times int) (faults []fault) {
	for range times {
		faults = append(faults, fault{name: name, said: said, play: func(ctx context.Context) error {
			before := len(bot.LogMentioning(said))
			d.Set(state)
			defer d.Set(disk.Fine)
			if err := pause(ctx, longest/2+time.Duration(rand.Int64N(int64(longest/2)))); err != nil {
				return err
			}
			for waited := time.Duration(0); len(bot.LogMentioning(said)) == before && waited < recovery; waited += 100 * time.Millisecond {
				if err := pause(ctx, 100*time.Millisecond); err != nil {
					return err
				}
			}
			return nil
		}})
	}
	return faults
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// The disk becomes full, or read-only, or gives errors, and is well again; another program keeps the database locked. The bot says what
// is the matter, loses nothing, and goes on by itself.
func TestDiskFailsForAWhile(t *testing.T) {
	w := theWorld(t)
	t.Parallel()
	c := newCrowd(t, w, false)
	d := w.newDisk(t)
	bot := w.newBot(t, botOptions{env: d.Env(), configure: both(c.pin(), onDisk(d))})
	c.meet(bot.UserID)
	faults := becomes(d, bot, disk.Full, "full disk", "The disk that holds the database is full. Make room", 3*time.Second, often(1, 20))
	faults = append(faults, becomes(d, bot, disk.ReadOnly, "read-only disk", "The database cannot be written: its file, or its disk, is read-only.", 3*time.Second, often(1, 10))...)
	faults = append(faults, becomes(d, bot, disk.Broken, "disk with errors", "The disk that holds the database gives errors.", 2*time.Second, often(0, 5))...)
	rand.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
	pid := bot.PID()
	c.endure(bot, "disk full, read-only or broken", often(16, 300), faults)
	if bot.PID() != pid {
		t.Error("the bot was started anew")
	}
}

// locked gives faults of another program that keeps the database for itself.
func locked(t *testing.T, file, said string, lasts time.Duration, times int) (faults []fault) {
	other := must(sql.Open("sqlite3", "file:"+file+"?_txlock=immediate&_busy_timeout=10000"))(t)
	t.Cleanup(func() { ok(t, other.Close()) })
	for range times {
		faults = append(faults, fault{name: "locked database", said: said, play: func(ctx context.Context) error {
			tx, err := other.BeginTx(ctx, nil)
			if err != nil {
				return err
			}
			err = pause(ctx, lasts)
			return errors.Join(err, tx.Rollback())
		}})
	}
	return faults
}

// Another program keeps the database locked for longer than SQLite waits.
func TestDatabaseIsLockedByAnother(t *testing.T) {
	w := theWorld(t)
	t.Parallel()
	c := newCrowd(t, w, false)
	bot := w.newBot(t, botOptions{configure: c.pin()})
	c.meet(bot.UserID)
	said := "Another program keeps the database locked"
	faults := locked(t, bot.DBPath(), said, 7*time.Second, 1)
	if *full {
		faults = append(locked(t, bot.DBPath(), said, 20*time.Second, 4), locked(t, bot.DBPath(), "", 2*time.Second, 16)...)
	}
	c.endure(bot, "locked by another program", often(12, 200), faults)
}

// PostgreSQL is restarted, as a service is and as after a crash, and its connections are cut.
func TestDatabaseServerGoesAway(t *testing.T) {
	w := theWorld(t)
	t.Parallel()
	c := newCrowd(t, w, false)
	server := must(postgres.Start(within(t, startPatience), w.root))(t)
	t.Cleanup(func() { ok(t, server.Stop()) })
	// What is committed has to survive a crash of the server. PostgreSQL does that by itself, and the tests' server leaves it out.
	ok(t, server.Exec(within(t, patience), "postgres", "ALTER ROLE sendertrust SET synchronous_commit=on"))
	uri := must(server.NewDatabase(within(t, patience)))(t)
	bot := w.newBot(t, botOptions{configure: both(c.pin(), func(config botproc.Config) {
		config["database"] = botproc.Config{"type": "postgres", "uri": uri}
	})})
	c.meet(bot.UserID)
	var faults []fault
	for range often(1, 10) {
		faults = append(faults,
			fault{name: "killed connections", play: func(ctx context.Context) error {
				return server.Exec(ctx, "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'sendertrust%'")
			}},
			fault{name: "restarted server", play: func(ctx context.Context) error { return server.Restart(ctx, postgres.Fast) }},
			fault{name: "crashed server", play: func(ctx context.Context) error { return server.Restart(ctx, postgres.Immediate) }},
		)
	}
	c.endure(bot, "PostgreSQL restarted, connections killed", often(16, 300), faults)
}

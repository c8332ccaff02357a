package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/postgres"
)

// takeOverLimit is how long the room may be without a bot that works.
const takeOverLimit = 10 * time.Second

// pair is two bots of one account on one PostgreSQL database: one works, one stands by.
type pair struct {
	leader, standBy *botproc.Bot
	uri             string
}

func newPair(t *testing.T, w *world) *pair {
	t.Helper()
	server := must(postgres.Start(within(t, startPatience), w.root))(t)
	t.Cleanup(func() { ok(t, server.Stop()) })
	p := &pair{uri: must(server.NewDatabase(within(t, patience)))(t)}
	localpart := must(w.register(within(t, patience), "bot"))(t)
	options := func() botproc.Options {
		return botproc.Options{
			Binary: w.binary, Homeserver: w.server.URL, UserID: id.NewUserID(localpart, "localhost"), Password: password,
			Dir: must(os.MkdirTemp(w.dir, "bot-"))(t),
			Configure: func(config botproc.Config) {
				config["database"] = botproc.Config{"type": "postgres", "uri": p.uri}
				config["encryption"] = botproc.Config{"pickle_key": "the same for both", "wait": keyWait.String()}
			},
		}
	}
	p.leader = must(botproc.Start(within(t, patience), options()))(t)
	p.standBy = must(botproc.StartStandBy(within(t, patience), options()))(t)
	t.Cleanup(func() {
		for _, bot := range []*botproc.Bot{p.leader, p.standBy} {
			_ = bot.Resume()
			bot.Kill()
			if err := bot.CheckLog(mark, password); err != nil {
				t.Error(err)
			}
			if t.Failed() {
				t.Log(bot.Tail(40))
			}
		}
	})
	return p
}

// swap says that the one who stood by works now.
func (p *pair) swap() { p.leader, p.standBy = p.standBy, p.leader }

// talk is somebody who writes all the time.
type talk struct {
	mu   sync.Mutex
	sent []id.EventID
	err  error
	more chan struct{}
	done chan struct{}
}

// beginTalk writes into the room until the context ends, one message after the other.
func beginTalk(ctx context.Context, person *people.Person, room id.RoomID) *talk {
	k := &talk{more: make(chan struct{}, 1), done: make(chan struct{})}
	go func() {
		defer close(k.done)
		ticker := time.NewTicker(400 * time.Millisecond)
		defer ticker.Stop()
		for n := 0; ; n++ {
			if n%7 == 6 {
				person.RotateSession(room)
			}
			eventID, err := person.Send(context.WithoutCancel(ctx), room, say(fmt.Sprint("message ", n)))
			k.mu.Lock()
			if err == nil {
				k.sent = append(k.sent, eventID)
			} else {
				k.err = err
			}
			k.mu.Unlock()
			select {
			case k.more <- struct{}{}:
			default:
			}
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
		}
	}()
	return k
}

// last gives the message that was sent last.
func (k *talk) last() id.EventID {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.sent) == 0 {
		return ""
	}
	return k.sent[len(k.sent)-1]
}

// all gives every message, when the talk has ended.
func (k *talk) all(t *testing.T) []id.EventID {
	t.Helper()
	<-k.done
	ok(t, k.err)
	return k.sent
}

func TestKilledLeaderIsReplacedAndEveryMessageAnsweredOnce(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	const kills = 20
	alice, masterKey := w.newStranger(t, "alice")
	p := newPair(t, w)
	room := newRoom(t, true, p.leader, alice)
	settle(t, alice, room)

	ctx, endTalk := context.WithCancel(within(t, 4*patience))
	defer endTalk()
	talking := beginTalk(ctx, alice, room)
	var owned, ready []time.Duration
	for range kills {
		<-talking.more
		must(alice.WaitForAnswer(ctx, talking.last()))(t)
		<-talking.more // its answer is under way
		p.leader.Kill()
		killed := time.Now()
		ok(t, p.standBy.WaitForLog(ctx, "This process owns the database now"))
		owned = append(owned, time.Since(killed))
		ok(t, p.standBy.WaitForLog(ctx, botproc.ReadyMessage))
		ready = append(ready, time.Since(killed))
		p.swap()
		ok(t, p.standBy.RestartStandBy(within(t, patience)))
	}
	endTalk()
	sent := talking.all(t)
	slices.Sort(owned)
	slices.Sort(ready)
	t.Logf("%d messages, %d kills; until another owned the database: median %v, at most %v; until it answered: median %v, at most %v",
		len(sent), kills, round(owned[kills/2]), round(owned[kills-1]), round(ready[kills/2]), round(ready[kills-1]))
	if slowest := ready[kills-1]; slowest > takeOverLimit {
		t.Errorf("a take-over took %v", slowest)
	}
	for _, eventID := range sent {
		if code := must(alice.WaitForAnswer(within(t, patience), eventID))(t).Annotation.Code; code != "unverified_identity" {
			t.Errorf("%s was answered by %s", eventID, code)
		}
	}
	expectOnlyAnswers(t, alice, room, sent...)
	last := must(alice.Send(within(t, patience), room, say("and now?")))(t)
	expect(t, p.leader, alice, last, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Millisecond) }

// audit has the database note who changes what, by the name that the connection has.
const audit = `
	CREATE TABLE audit (app TEXT NOT NULL, name TEXT NOT NULL, at TIMESTAMPTZ NOT NULL);
	CREATE FUNCTION audit() RETURNS TRIGGER LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO audit VALUES (current_setting('application_name'), TG_TABLE_NAME, clock_timestamp());
		RETURN NULL;
	END $$;
	DO $$
	DECLARE name TEXT;
	BEGIN
		FOR name IN SELECT tablename FROM pg_tables WHERE schemaname='public' AND tablename<>'audit' LOOP
			EXECUTE format('CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON %I FOR EACH STATEMENT EXECUTE FUNCTION audit()', name);
		END LOOP;
	END $$
`

func TestPausedLeaderIsReplacedAndWritesNothingWhenItGoesOn(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	p := newPair(t, w)
	room := newRoom(t, true, p.leader, alice)
	settle(t, alice, room)
	conn := must(pgx.Connect(within(t, patience), p.uri))(t)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	_, err := conn.Exec(within(t, patience), audit)
	ok(t, err)

	ctx, endTalk := context.WithCancel(within(t, 2*patience))
	defer endTalk()
	talking := beginTalk(ctx, alice, room)
	<-talking.more
	must(alice.WaitForAnswer(ctx, talking.last()))(t)
	<-talking.more
	ok(t, p.leader.Pause())
	paused := time.Now()
	ok(t, p.standBy.WaitForLog(ctx, botproc.ReadyMessage))
	took := time.Since(paused)
	t.Logf("taken over %v after the pause began", round(took))
	if took > takeOverLimit {
		t.Errorf("the take-over took %v", took)
	}
	ok(t, p.leader.Resume())
	ok(t, p.leader.WaitForLog(ctx, "This process no longer owns the database"))
	ok(t, p.leader.WaitForLog(ctx, botproc.StandByMessage))
	p.swap()
	must(alice.WaitForAnswer(ctx, talking.last()))(t)
	endTalk()
	sent := talking.all(t)
	for _, eventID := range sent {
		must(alice.WaitForAnswer(within(t, patience), eventID))(t)
	}
	expectOnlyAnswers(t, alice, room, sent...)
	if !p.standBy.Running() || !p.leader.Running() {
		t.Error("one of the two has ended")
	}

	var former, present, late int
	ok(t, conn.QueryRow(within(t, patience), `
		SELECT COUNT(*) FILTER (WHERE app='sendertrust/1'), COUNT(*) FILTER (WHERE app='sendertrust/2'),
		       COUNT(*) FILTER (WHERE app='sendertrust/1' AND at>(SELECT MAX(at) FROM audit WHERE name='sendertrust_owner'))
		FROM audit
	`).Scan(&former, &present, &late))
	if former == 0 || present == 0 || late > 0 {
		t.Errorf("the former owner wrote %d times, %d of them after the take-over; the present one %d times", former, late, present)
	}
	t.Logf("%d messages; %d statements of the former owner, none of them after the take-over, and %d of the present one", len(sent), former, present)
}

func TestSecondProcessOnAFileSaysWhoseItIs(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newBot(t, nil)
	file := must(filepath.EvalSymlinks(bot.DBPath()))(t)
	second, err := w.startBot(within(t, patience), must(os.MkdirTemp(w.dir, "bot-"))(t), func(config botproc.Config) {
		config["database"].(botproc.Config)["uri"] = "file:" + bot.DBPath() + "?_txlock=immediate"
	})
	if err == nil {
		second.Kill()
		t.Fatal("two processes work with one file")
	}
	want := fmt.Sprintf("the database %s is in use by process %d, and only one may work with it", file, bot.PID())
	if !strings.Contains(err.Error(), "exit status 2") || !strings.Contains(err.Error(), want) {
		t.Errorf("it says: %v\nwant: %s", err, want)
	}
	if !bot.Running() {
		t.Error("the first process has ended")
	}
}

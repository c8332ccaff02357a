package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/disk"
	"sendertrust/e2e/people"
	"sendertrust/e2e/synapse"
)

// newDisk makes an empty disk for a bot's database.
func (w *world) newDisk(t *testing.T) *disk.Disk {
	t.Helper()
	made := must(disk.New(within(t, patience), must(os.MkdirTemp(w.dir, "disk-"))(t), must(os.MkdirTemp(w.dir, "shim-"))(t)))(t)
	t.Cleanup(func() { ok(t, made.Close()) })
	return made
}

// onDisk has a bot's database on a disk.
func onDisk(d *disk.Disk) func(botproc.Config) {
	return func(config botproc.Config) {
		config["database"].(botproc.Config)["uri"] = "file:" + databaseOn(d) + "?_txlock=immediate"
	}
}

func databaseOn(d *disk.Disk) string { return filepath.Join(d.Dir, "sendertrust.db") }

// both makes one change of two.
func both(changes ...func(botproc.Config)) func(botproc.Config) {
	return func(config botproc.Config) {
		for _, change := range changes {
			change(config)
		}
	}
}

// outages has the power of a bot's machine fail again and again.
type outages struct {
	bot  *botproc.Bot
	disk *disk.Disk
	// tries counts them, atPoints those that came at a fault point, and atWrites those in the middle of writing; loss is what they did.
	tries, atPoints, atWrites int
	loss                      disk.Loss
	peak                      int64
}

// mostWrites is more than a bot writes in a life as long as the longest here.
const mostWrites = 150

// fail has the power fail once: within so long, or earlier if something kills the bot before. The bot is not started again.
func (o *outages) fail(ctx context.Context, within time.Duration, died *int) error {
	select {
	case <-o.bot.Exited():
		if o.bot.ExitCode() != -1 {
			return fmt.Errorf("the bot has ended by itself, with %d:\n%s", o.bot.ExitCode(), o.bot.Tail(20))
		}
		*died++
	case <-time.After(within):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if peak, err := o.bot.PeakRSS(); err == nil {
		o.peak = max(o.peak, peak)
	}
	o.bot.Kill()
	loss, err := o.disk.LosePower(rand.Uint64())
	if err != nil {
		return err
	}
	o.tries++
	o.loss.Unsynced, o.loss.Lost = o.loss.Unsynced+loss.Unsynced, o.loss.Lost+loss.Lost
	return nil
}

// again has the power fail so often, and on until something was on its way to the disk: in the middle of writing, at fault points, and at
// random. It leaves the bot running.
func (o *outages) again(ctx context.Context, tries int) error {
	// What a bot dies of may come to pass when nothing is on its way.
	for try := 0; try < tries || o.loss.Unsynced == 0 && try < 5*tries; try++ {
		var env []string
		within, died := longestLife, new(int)
		switch try % 3 {
		case 0:
			// People talk as long as this goes on, so it comes to write so much; when, depends on how busy the machine is.
			o.disk.DieAt(1 + rand.Uint64N(mostWrites))
			within, died = pointPatience, &o.atWrites
		case 1:
			env = []string{fmt.Sprintf("FAULTPOINT=%s:%d", faultPoints[try/3%len(faultPoints)], 1+rand.IntN(mostPasses))}
			within, died = pointPatience/2, &o.atPoints
		case 2:
			within = time.Duration(rand.Int64N(int64(longestLife)))
		}
		if err := o.bot.Launch(env...); err != nil {
			return err
		}
		if err := o.fail(ctx, within, died); err != nil {
			return fmt.Errorf("power failure %d: %w", try+1, err)
		}
	}
	return o.bot.Restart(ctx)
}

// The power fails, at random moments and at those at which it hurts most, while people talk and new ones come: what was synced is there,
// and of the rest whatever chance says.
func TestPowerFails(t *testing.T) {
	w := theWorld(t)
	t.Parallel()
	c := newCrowd(t, w, false)
	d := w.newDisk(t)
	o := &outages{disk: d, bot: w.newBot(t, botOptions{env: d.Env(), configure: both(c.pin(), onDisk(d))})}
	c.meet(o.bot.UserID)
	o.bot.Kill()
	must(d.LosePower(rand.Uint64()))(t)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan struct{})
	var failed error
	go func() {
		defer close(done)
		failed = o.again(ctx, often(4, 42))
	}()
	// Each newcomer uses up a one-time key that the bot has published before some failure.
	newcomers := make(chan error, 1)
	go func() { newcomers <- c.welcome(ctx, o.bot.UserID, often(1, 5), done) }()
	ok(t, c.talk(ctx, often(24, 400), done))
	<-done
	ok(t, failed)
	ok(t, <-newcomers)
	r := result{part: "storage", what: "power fails", tries: o.tries, peak: o.peak}
	c.ledger.await(within(t, patience), o.bot.UserID)
	c.ledger.settle(within(t, patience), t, o.bot.UserID, c.codeOfAll)
	c.ledger.count(t, o.bot.UserID, &r)
	r.note = fmt.Sprintf("%d while writing, %d at fault points; %d writes to sectors not synced, %d lost", o.atWrites, o.atPoints, o.loss.Unsynced, o.loss.Lost)
	if o.loss.Unsynced == 0 {
		t.Error("nothing was ever on its way to the disk: does the bot go by it?")
	}
	check(t, r)
}

// welcome has people come one after the other, with a device, a room and a message of their own, until all have or the others are done.
func (c *crowd) welcome(ctx context.Context, bot id.UserID, newcomers int, othersDone <-chan struct{}) error {
	for n := range newcomers {
		if err := c.welcomeOne(ctx, bot); err != nil {
			return fmt.Errorf("newcomer %d: %w", n+1, err)
		}
		select {
		case <-othersDone:
			return nil
		case <-time.After(time.Second):
		}
	}
	return nil
}

// codeOfAll is codeOf for newcomers too: they have no identity.
func (c *crowd) codeOfAll(person *people.Person) string {
	if slices.Contains(c.persons(), person) {
		return c.codeOf(person)
	}
	return "unsigned_device"
}

func (c *crowd) welcomeOne(ctx context.Context, bot id.UserID) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("no newcomer"))
	defer cancel()
	localpart, err := c.w.account(ctx, "newcomer")
	if err != nil {
		return err
	}
	person, err := people.Login(ctx, c.w.server.URL, localpart, password, people.Options{})
	if err != nil {
		return err
	}
	c.t.Cleanup(person.Close)
	room, err := person.CreateRoom(ctx, true, bot)
	if err != nil {
		return err
	}
	if err = person.WaitJoined(ctx, room, bot); err != nil {
		return err
	}
	eventID, err := person.Send(ctx, room, say("I am new here"))
	if err != nil {
		return err
	}
	c.ledger.note(message{eventID: eventID, roomID: room, reader: person, code: "unsigned_device", sent: time.Now()})
	return nil
}

// The power fails while a bot starts for the first time: it makes its device, its identity and its recovery key then.
func TestPowerFailsAtTheFirstStart(t *testing.T) {
	w := theWorld(t)
	t.Parallel()
	r := result{part: "storage", what: "power fails at first start", note: "of tries, those that can start are held"}
	for range often(1, 5) {
		localpart := must(w.account(within(t, patience), "bot"))(t)
		d := w.newDisk(t)
		dir := must(os.MkdirTemp(w.dir, "bot-"))(t)
		options := botproc.Options{
			Binary: w.binary, Homeserver: w.server.URL, UserID: id.NewUserID(localpart, synapse.ServerName), Password: password,
			Dir: dir, LogFile: filepath.Join(dir, "bot.log"), Env: d.Env(), Configure: onDisk(d),
		}
		short, cancel := context.WithTimeout(t.Context(), time.Duration(rand.Int64N(int64(longestLife))))
		bot, _ := botproc.Start(short, options)
		cancel()
		t.Cleanup(bot.Kill)
		w.mu.Lock()
		w.bots = append(w.bots, bot)
		w.mu.Unlock()
		o := &outages{bot: bot, disk: d}
		o.bot.Kill()
		must(d.LosePower(rand.Uint64()))(t)
		r.tries, r.messages = r.tries+1+often(2, 5), r.messages+1
		if err := o.again(within(t, patience), often(2, 5)); err != nil {
			t.Error(err)
			r.lost++
		} else {
			r.held++
		}
	}
	check(t, r)
}

// What shows that these tests can fail: where SQLite does not sync what it commits, or the disk lies about it, the same failures lose
// something at once.
func TestPowerFailureIsNoticedWithoutSync(t *testing.T) {
	w := theWorld(t)
	t.Parallel()
	for name, lies := range map[string]bool{"synchronous=NORMAL": false, "a disk that lies": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			alice := w.newStranger(t, "alice")
			d := w.newDisk(t)
			bot := w.newBot(t, botOptions{env: d.Env(), configure: both(onDisk(d), func(config botproc.Config) {
				config["encryption"].(botproc.Config)["wait"] = "3s"
				if !lies {
					config["database"].(botproc.Config)["type"] = "sqlite3-fk-wal"
				}
			})})
			w.leaveLogAlone(bot)
			room := w.newRoom(t, alice, bot.UserID)
			ok(t, alice.WaitJoined(within(t, patience), room, bot.UserID))
			d.SetLazy(lies)
			const tries = 5
			for try := 1; ; try++ {
				fault := w.surviveOutage(t, bot, d, alice, room)
				if fault != nil {
					t.Logf("noticed at try %d: %v", try, fault)
					return
				} else if try == tries {
					t.Fatalf("nothing noticed in %d tries", tries)
				}
			}
		})
	}
}

// surviveOutage has the power fail once after some messages, and gives what is not as it should be.
func (w *world) surviveOutage(t *testing.T, bot *botproc.Bot, d *disk.Disk, alice *people.Person, room id.RoomID) error {
	var l ledger
	talk := func() {
		for range 3 {
			eventID := must(alice.Send(within(t, patience), room, say("hello")))(t)
			l.note(message{eventID: eventID, roomID: room, reader: alice, code: "unverified_identity", sent: time.Now()})
		}
	}
	talk()
	l.await(within(t, 15*time.Second), bot.UserID)
	bot.Kill()
	must(d.LosePower(rand.Uint64()))(t)
	if err := bot.Restart(within(t, 15*time.Second)); err != nil {
		return err
	}
	talk()
	l.await(within(t, 15*time.Second), bot.UserID)
	var r result
	l.count(t, bot.UserID, &r)
	if !r.asPromised() {
		return fmt.Errorf("%d lost, %d doubled, %d wrong", r.lost, r.doubled, r.wrong)
	}
	return nil
}

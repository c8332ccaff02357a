// Package e2e tests the bot as its users have it: as a process, against a real homeserver (Synapse), in rooms with real clients.
// Clients that must lie are those of package people; Element's own crypto, in package element, is the reference.
//
// The tests share two worlds of a homeserver and a bot, each test in rooms of its own; those that stop the bot, or need another
// configuration, have one for themselves. Nothing runs with -short.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/synapse"
)

const (
	// patience is how long a test waits for one thing. It is far more than any answer takes, so that a busy machine fails nothing.
	patience = 60 * time.Second
	// keyWait is encryption.wait of all bots here: how long one waits for a key before it gives up.
	keyWait = 8 * time.Second
	// startPatience is how long the homeserver and the bot may take to be installed, built and started.
	startPatience = 5 * time.Minute
	// parallelTests is more than there are processors: tests mostly wait.
	parallelTests = "12"
	// mark is part of every text that people send here. It must not appear in a bot's log.
	mark = "nobody-else's-business"
	// password is every account's. It must not appear either.
	password = "correct-horse-battery-staple"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if set := flag.Lookup("test.parallel"); set != nil && set.Value.String() == set.DefValue {
		if err := flag.Set("test.parallel", parallelTests); err != nil {
			panic(err)
		}
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		closeWorlds()
		os.Exit(1)
	}()
	code := m.Run()
	for _, w := range worlds {
		if err := w.checkLog(); err != nil {
			fmt.Fprintln(os.Stderr, "FAIL:", err)
			code = 1
		}
	}
	closeWorlds()
	os.Exit(code)
}

// world is what about half of the tests share.
type world struct {
	once sync.Once
	err  error

	root, dir, binary string
	server            *synapse.Server
	// bot answers in the rooms of all tests that do not need one of their own. Its configuration pins the master keys of
	// the people below.
	bot *botproc.Bot
	// verified keeps the identity that is pinned; resetting will reset it.
	verified, resetting       *people.Person
	verifiedKey, resettingKey id.Ed25519

	accounts atomic.Int64
	closing  sync.Once
}

// worlds are two: a homeserver keeps one processor busy at most, and the tests wait for it most of the time.
var worlds = []*world{new(world), new(world)}

// inhabitants are the tests by name, each with its world.
var inhabitants = struct {
	sync.Mutex
	worlds map[string]*world
}{worlds: make(map[string]*world)}

// theWorld gives the world that a test, with its subtests, lives in. The first test in it starts it.
func theWorld(t *testing.T) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a homeserver: not with -short")
	}
	w := worldOf(t)
	w.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), startPatience)
		defer cancel()
		w.err = w.start(ctx)
	})
	if w.err != nil {
		t.Fatal(w.err)
	}
	return w
}

// worldOf has the tests take turns.
func worldOf(t *testing.T) *world {
	inhabitants.Lock()
	defer inhabitants.Unlock()
	name, _, _ := strings.Cut(t.Name(), "/")
	if inhabitants.worlds[name] == nil {
		inhabitants.worlds[name] = worlds[len(inhabitants.worlds)%len(worlds)]
	}
	return inhabitants.worlds[name]
}

func closeWorlds() {
	for _, w := range worlds {
		w.close()
	}
}

func (w *world) start(ctx context.Context) (err error) {
	if w.dir, err = os.MkdirTemp("", "sendertrust-e2e-"); err != nil {
		return err
	}
	if w.root, err = botproc.ProjectRoot(ctx); err != nil {
		return err
	}
	if w.server, err = synapse.Start(ctx, synapse.Options{ProjectRoot: w.root}); err != nil {
		return err
	}
	if w.binary, err = botproc.Build(ctx, w.root, w.dir); err != nil {
		return err
	}
	if w.verified, w.verifiedKey, err = w.newPinned(ctx, "verified"); err != nil {
		return err
	}
	if w.resetting, w.resettingKey, err = w.newPinned(ctx, "resetting"); err != nil {
		return err
	}
	w.bot, err = w.startBot(ctx, filepath.Join(w.dir, "bot"), func(config botproc.Config) {
		pin(config, w.verified.UserID, w.verifiedKey)
		pin(config, w.resetting.UserID, w.resettingKey)
	})
	return err
}

// pin makes the bot hold a user for verified by this master key.
func pin(config botproc.Config, userID id.UserID, masterKey id.Ed25519) {
	trust, ok := config["trust"].(botproc.Config)
	if !ok {
		trust = botproc.Config{"verified_users": botproc.Config{}}
		config["trust"] = trust
	}
	trust["verified_users"].(botproc.Config)[userID.String()] = masterKey.String()
}

// close stops everything that the tests share.
func (w *world) close() {
	w.closing.Do(func() {
		if w.bot != nil {
			w.bot.Kill()
		}
		for _, person := range []*people.Person{w.verified, w.resetting} {
			if person != nil {
				person.Close()
			}
		}
		if w.server != nil {
			_ = w.server.Stop()
		}
		if w.dir != "" {
			_ = os.RemoveAll(w.dir)
		}
	})
}

// checkLog says what the shared bot's log must not contain but does, and whether the bot has ended before its time.
func (w *world) checkLog() error {
	if w.bot == nil {
		return nil
	}
	err := w.bot.CheckLog(mark, password)
	if !w.bot.Running() {
		err = errors.Join(err, errors.New("the shared bot has ended:\n"+w.bot.Tail(30)))
	}
	return err
}

// register makes an account with a name of its own.
func (w *world) register(ctx context.Context, name string) (localpart string, err error) {
	localpart = fmt.Sprintf("%s%d", name, w.accounts.Add(1))
	return localpart, w.server.Register(ctx, localpart, password)
}

func (w *world) newPinned(ctx context.Context, name string) (person *people.Person, masterKey id.Ed25519, err error) {
	localpart, err := w.register(ctx, name)
	if err != nil {
		return nil, "", err
	}
	if person, err = people.Login(ctx, w.server.URL, localpart, password, people.Options{}); err != nil {
		return nil, "", err
	}
	masterKey, err = person.BootstrapCrossSigning(ctx)
	return person, masterKey, err
}

// startBot starts a bot with an account of its own in a directory that it makes.
func (w *world) startBot(ctx context.Context, dir string, configure func(botproc.Config)) (*botproc.Bot, error) {
	localpart, err := w.register(ctx, "bot")
	if err != nil {
		return nil, err
	}
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return botproc.Start(ctx, botproc.Options{
		Binary: w.binary, Homeserver: w.server.URL, UserID: id.NewUserID(localpart, "localhost"), Password: password, Dir: dir,
		Configure: func(config botproc.Config) {
			config["encryption"].(botproc.Config)["wait"] = keyWait.String()
			if configure != nil {
				configure(config)
			}
		},
	})
}

// newBot starts a bot for one test, with checks of its log at the end.
func (w *world) newBot(t *testing.T, configure func(botproc.Config)) *botproc.Bot {
	t.Helper()
	dir := must(os.MkdirTemp(w.dir, "bot-"))(t) // there, since an interrupted test does not clean up
	bot := must(w.startBot(within(t, patience), dir, configure))(t)
	t.Cleanup(func() {
		bot.Kill()
		if err := bot.CheckLog(mark, password); err != nil {
			t.Error(err)
		}
	})
	return bot
}

// newPerson makes a person with an account, without a cross-signing identity.
func (w *world) newPerson(t *testing.T, name string) *people.Person {
	t.Helper()
	return w.login(t, must(w.register(within(t, patience), name))(t), people.Options{})
}

// newStranger makes a person with an account and a cross-signing identity that nobody verified.
func (w *world) newStranger(t *testing.T, name string) (*people.Person, id.Ed25519) {
	t.Helper()
	person := w.newPerson(t, name)
	return person, must(person.BootstrapCrossSigning(within(t, patience)))(t)
}

// login makes a new device of an account.
func (w *world) login(t *testing.T, user string, options people.Options) *people.Person {
	t.Helper()
	person := must(people.Login(within(t, patience), w.server.URL, user, password, options))(t)
	t.Cleanup(person.Close)
	return person
}

// newRoom makes a room of the host's with the bot and the guests in it.
func newRoom(t *testing.T, encrypted bool, bot *botproc.Bot, host *people.Person, guests ...*people.Person) id.RoomID {
	t.Helper()
	ctx := within(t, patience)
	invited := []id.UserID{bot.UserID}
	for _, guest := range guests {
		if guest.UserID != host.UserID {
			invited = append(invited, guest.UserID)
		}
	}
	room := must(host.CreateRoom(ctx, encrypted, invited...))(t)
	for _, guest := range guests {
		if guest.UserID != host.UserID {
			ok(t, guest.Join(ctx, room))
		}
	}
	for _, member := range append([]*people.Person{host}, guests...) {
		for _, userID := range invited {
			ok(t, member.WaitJoined(ctx, room, userID))
		}
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		lines := bot.LogMentioning(room.String())
		for _, line := range lines[max(0, len(lines)-60):] {
			t.Log(line)
		}
	})
	return room
}

// say makes a text that must not be found in a log.
func say(words string) string { return words + " (" + mark + ")" }

// within gives a context that ends with the test, or when the time is up.
func within(t *testing.T, limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, fmt.Errorf("nothing for %v", limit))
	t.Cleanup(cancel)
	return ctx
}

// must gives the value of a call that may not fail: must(alice.Send(ctx, room, text))(t).
func must[T any](value T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		ok(t, err)
		return value
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// expect waits for the bot's answer to an event of an encrypted room and compares all that programs rely on. Of the annotation,
// event_id need not be given.
func expect(t *testing.T, bot *botproc.Bot, observer *people.Person, eventID id.EventID, want people.Annotation) people.Answer {
	t.Helper()
	answer := expectAnswer(t, bot, observer, eventID, want)
	if !answer.Encrypted {
		t.Errorf("the answer to %s went into an encrypted room in the clear", eventID)
	}
	return answer
}

func expectAnswer(t *testing.T, bot *botproc.Bot, observer *people.Person, eventID id.EventID, want people.Annotation) people.Answer {
	t.Helper()
	answer := *must(observer.WaitForAnswer(within(t, patience), eventID))(t)
	want.EventID = eventID
	if answer.Malformed != nil {
		t.Error(answer.Malformed)
	}
	if answer.Annotation != want {
		t.Errorf("annotation\n got %+v\nwant %+v", answer.Annotation, want)
	}
	if answer.Edits > 0 {
		t.Errorf("the answer was %s first, and edited", answer.First)
	}
	switch {
	case answer.Sender != bot.UserID:
		t.Errorf("the answer is from %s", answer.Sender)
	case answer.MsgType != event.MsgNotice:
		t.Errorf("the answer is an %s", answer.MsgType)
	case answer.InReplyTo != eventID:
		t.Errorf("the answer replies to %q", answer.InReplyTo)
	case answer.Body == "" || answer.FormattedBody == "":
		t.Errorf("the answer lacks text (%q) or HTML (%q)", answer.Body, answer.FormattedBody)
	}
	return answer
}

// expectOnlyAnswers makes sure that everything was answered exactly once, by a message that is answered after all of them.
func expectOnlyAnswers(t *testing.T, observer *people.Person, room id.RoomID, answered ...id.EventID) {
	t.Helper()
	settle(t, observer, room)
	for _, eventID := range answered {
		if answers := observer.Answers(eventID); len(answers) != 1 {
			t.Errorf("%s has %d answers: %+v", eventID, len(answers), answers)
		}
	}
}

// settle sends a message and waits for its answer: what the bot was to say before has come when it returns.
func settle(t *testing.T, person *people.Person, room id.RoomID) {
	t.Helper()
	ctx := within(t, patience)
	must(person.WaitForAnswer(ctx, must(person.Send(ctx, room, say("anything else?")))(t)))(t)
}

// sessionID gives the ID of the session with which a person sends into a room.
func sessionID(t *testing.T, person *people.Person, room id.RoomID) id.SessionID {
	t.Helper()
	return must(person.CurrentSession(within(t, patience), room))(t).ID
}

package soak

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/element"
	"sendertrust/e2e/people"
	"sendertrust/e2e/postgres"
	"sendertrust/e2e/synapse"
)

const (
	// patience is how long a test waits for one thing.
	patience = 90 * time.Second
	// startPatience is how long servers and programs may take to be installed, built and started.
	startPatience = 5 * time.Minute
	// keyWait is encryption.wait of all bots here.
	keyWait = 20 * time.Second
	// mark is part of every text that people send here. It must not appear in a bot's log.
	mark = "nobody-else's-business"
	// password is every account's. It must not appear either.
	password = "correct-horse-battery-staple"
	// rotation is after how many messages the bot makes a new session, so that it writes Olm messages often.
	rotation = 10
)

// world is what the parts share: a homeserver, a database server, and the bot's program.
type world struct {
	once sync.Once
	err  error

	root, dir string
	// binary is the bot with its fault points.
	binary   string
	server   *synapse.Server
	postgres *postgres.Server

	accounts atomic.Int64
	closing  sync.Once

	mu sync.Mutex
	// bots are all that were started, for their logs to be checked.
	bots []*botproc.Bot
}

var shared = new(world)

// theWorld starts what the parts share, once, and gives it.
func theWorld(t *testing.T) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a homeserver: not with -short")
	}
	shared.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), startPatience)
		defer cancel()
		shared.err = shared.start(ctx)
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared
}

func (w *world) start(ctx context.Context) (err error) {
	if w.dir, err = os.MkdirTemp("", "sendertrust-soak-"); err != nil {
		return err
	}
	if w.root, err = botproc.ProjectRoot(ctx); err != nil {
		return err
	}
	if w.binary, err = botproc.BuildWith(ctx, w.root, filepath.Join(w.dir, "sendertrust"), withFaultPoints...); err != nil {
		return err
	}
	if w.server, err = synapse.Start(ctx, synapse.Options{ProjectRoot: w.root}); err != nil {
		return err
	}
	w.postgres, err = postgres.Start(ctx, w.root)
	return err
}

var withFaultPoints = []string{"-tags", "goolm,faultpoints"}

func (w *world) close() (err error) {
	w.closing.Do(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, bot := range w.bots {
			bot.Kill()
		}
		if w.server != nil {
			err = errors.Join(err, w.server.Stop())
		}
		if w.postgres != nil {
			err = errors.Join(err, w.postgres.Stop())
		}
		if w.dir != "" {
			err = errors.Join(err, os.RemoveAll(w.dir))
		}
	})
	return err
}

// account makes an account with a name of its own.
func (w *world) account(ctx context.Context, name string) (localpart string, err error) {
	localpart = fmt.Sprintf("%s%d", name, w.accounts.Add(1))
	return localpart, w.server.Register(ctx, localpart, password)
}

// botOptions are what a bot can be asked for here.
type botOptions struct {
	// binary is another program than the shared one.
	binary string
	// homeserver is another address than the homeserver's, as that of a proxy.
	homeserver string
	// postgres gives the bot a database on the database server instead of a file.
	postgres  bool
	env       []string
	configure func(botproc.Config)
}

// newBot starts a bot with an account and a directory of its own, and waits until it is ready. Its whole log goes to a file, which is
// searched for secrets at the end.
func (w *world) newBot(t *testing.T, options botOptions) *botproc.Bot {
	t.Helper()
	localpart := must(w.account(within(t, patience), "bot"))(t)
	dir := must(os.MkdirTemp(w.dir, "bot-"))(t)
	var uri string
	if options.postgres {
		uri = must(w.postgres.NewDatabase(within(t, patience)))(t)
	}
	if options.binary == "" {
		options.binary = w.binary
	}
	if options.homeserver == "" {
		options.homeserver = w.server.URL
	}
	bot := must(botproc.Start(within(t, patience), botproc.Options{
		Binary: options.binary, Homeserver: options.homeserver, UserID: id.NewUserID(localpart, synapse.ServerName), Password: password,
		Dir: dir, LogFile: filepath.Join(dir, "bot.log"), Env: options.env,
		Configure: func(config botproc.Config) {
			config["encryption"].(botproc.Config)["wait"] = keyWait.String()
			if options.postgres {
				config["database"] = botproc.Config{"type": "postgres", "uri": uri}
			}
			if options.configure != nil {
				options.configure(config)
			}
		},
	}))(t)
	w.mu.Lock()
	w.bots = append(w.bots, bot)
	w.mu.Unlock()
	t.Cleanup(func() {
		bot.Kill()
		if t.Failed() {
			t.Logf("the end of the log of %s:\n%s", bot.UserID, bot.Tail(25))
		}
	})
	return bot
}

// newPerson makes a person with an account, without a cross-signing identity.
func (w *world) newPerson(t *testing.T, name string) *people.Person {
	t.Helper()
	localpart := must(w.account(within(t, patience), name))(t)
	person := must(people.Login(within(t, patience), w.server.URL, localpart, password, people.Options{}))(t)
	t.Cleanup(person.Close)
	return person
}

// newStranger makes a person with an account and a cross-signing identity that nobody verified.
func (w *world) newStranger(t *testing.T, name string) *people.Person {
	t.Helper()
	person := w.newPerson(t, name)
	must(person.BootstrapCrossSigning(within(t, patience)))(t)
	return person
}

// newElement makes a person like [world.newStranger], who uses Element's crypto.
func (w *world) newElement(t *testing.T, name string) *element.Client {
	t.Helper()
	localpart := must(w.account(within(t, patience), name))(t)
	client := must(element.Start(within(t, startPatience), w.root, w.server.URL, localpart, password))(t)
	t.Cleanup(func() { ok(t, client.Close()) })
	must(client.BootstrapCrossSigning(within(t, patience)))(t)
	return client
}

// newRoom makes an encrypted room of the host's with the others in it. Sessions in it are soon replaced.
func (w *world) newRoom(t *testing.T, host *people.Person, guests ...id.UserID) id.RoomID {
	t.Helper()
	return w.newRoomRotating(t, rotation, host, guests...)
}

// newRoomRotating is [world.newRoom] with a session for each so many messages.
func (w *world) newRoomRotating(t *testing.T, rotation int, host *people.Person, guests ...id.UserID) id.RoomID {
	t.Helper()
	ctx := within(t, patience)
	created := must(host.Client.CreateRoom(ctx, &mautrix.ReqCreateRoom{
		Preset: "private_chat", Invite: guests,
		InitialState: []*event.Event{{
			Type: event.StateEncryption,
			Content: event.Content{Parsed: &event.EncryptionEventContent{
				Algorithm: id.AlgorithmMegolmV1, RotationPeriodMessages: rotation,
			}},
		}},
	}))(t)
	ok(t, host.WaitJoined(ctx, created.RoomID, host.UserID))
	return created.RoomID
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

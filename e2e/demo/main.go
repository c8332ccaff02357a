// Command demo shows what the bot does: it starts a private homeserver, the bot, and a few people who talk, and prints what each
// says and what the bot answers. It ends by itself and leaves nothing running.
//
// With KEEP=1 in the environment it goes on until Ctrl-C, so that one can log in with any Matrix client.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/synapse"
)

const (
	// password is every account's: the homeserver is reachable only from this machine, and is gone afterwards.
	password = "sendertrust-demo"
	botName  = "trustbot"
	// patience is how long one thing in the conversation may take, startPatience how long everything before it.
	patience      = 30 * time.Second
	startPatience = 10 * time.Minute

	exitInterrupted = 130
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	stage := newStage(os.Stdout)
	err := run(ctx, stage, os.Getenv("KEEP") != "" && os.Getenv("KEEP") != "0")
	interrupted := ctx.Err() != nil
	cancel()
	switch {
	case err == nil:
		stage.note("\nThat was all. Everything is stopped.")
	case interrupted:
		stage.note("\nInterrupted. Everything is stopped.")
		os.Exit(exitInterrupted)
	default:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// cast is everything that runs while the demo does.
type cast struct {
	server *synapse.Server
	bot    *botproc.Bot
	room   id.RoomID

	alice, bob, thief *people.Person
	// bobSaid is what Bob said first.
	bobSaid id.EventID
}

func run(ctx context.Context, stage *stage, keep bool) (err error) {
	dir, err := os.MkdirTemp("", "sendertrust-demo-")
	if err != nil {
		return err
	}
	all := new(cast)
	defer func() { err = errors.Join(err, all.stop(), os.RemoveAll(dir)) }()
	if err = all.start(ctx, stage, dir); err != nil {
		return err
	}
	if err = all.play(ctx, stage); err != nil {
		return fmt.Errorf("%w\nThe bot's last words:\n%s", err, all.bot.Tail(10))
	}
	if !keep {
		return nil
	}
	return all.keep(ctx, stage)
}

// start brings up the homeserver, the people and the bot, and gets them into one room.
func (c *cast) start(ctx context.Context, stage *stage, dir string) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startPatience, errors.New("it took too long"))
	defer cancel()
	root, err := botproc.ProjectRoot(ctx)
	if err != nil {
		return err
	}
	stage.note("Building the bot …")
	binary, err := botproc.Build(ctx, root, dir)
	if err != nil {
		return err
	}
	stage.note("Starting a private Matrix homeserver …")
	if c.server, err = synapse.Start(ctx, synapse.Options{ProjectRoot: root}); err != nil {
		return err
	}
	stage.note("Registering people …")
	if c.alice, _, err = c.person(ctx, "alice"); err != nil {
		return err
	}
	var bobsKey id.Ed25519
	if c.bob, bobsKey, err = c.person(ctx, "bob"); err != nil {
		return err
	}
	if err = c.server.Register(ctx, botName, password); err != nil {
		return err
	}
	stage.note("Starting the bot …")
	c.bot, err = botproc.Start(ctx, botproc.Options{
		Binary: binary, Homeserver: c.server.URL, UserID: id.NewUserID(botName, synapse.ServerName), Password: password, Dir: dir,
		Configure: func(config botproc.Config) {
			config["trust"] = botproc.Config{"verified_users": botproc.Config{c.bob.UserID.String(): bobsKey.String()}}
		},
	})
	if err != nil {
		return err
	}
	return c.meet(ctx)
}

// person registers somebody and lets them set up encryption as they should.
func (c *cast) person(ctx context.Context, name string) (person *people.Person, masterKey id.Ed25519, err error) {
	if err = c.server.Register(ctx, name, password); err != nil {
		return nil, "", err
	}
	if person, err = people.Login(ctx, c.server.URL, name, password, people.Options{DeviceName: name + "'s phone"}); err != nil {
		return nil, "", err
	}
	masterKey, err = person.BootstrapCrossSigning(ctx)
	return person, masterKey, err
}

// meet makes the room and waits until everybody is in it.
func (c *cast) meet(ctx context.Context) (err error) {
	if c.room, err = c.alice.CreateRoom(ctx, true, c.bob.UserID, c.bot.UserID); err != nil {
		return err
	}
	if err = c.bob.Join(ctx, c.room); err != nil {
		return err
	}
	for _, person := range []*people.Person{c.alice, c.bob} {
		for _, member := range []id.UserID{c.alice.UserID, c.bob.UserID, c.bot.UserID} {
			if err = person.WaitJoined(ctx, c.room, member); err != nil {
				return err
			}
		}
	}
	return nil
}

// play is the conversation.
func (c *cast) play(ctx context.Context, stage *stage) (err error) {
	stage.title("An encrypted room: Alice, Bob, and the bot")

	stage.scene("Alice has set up encryption properly. Nobody has checked for the bot who she is.")
	if err = c.say(ctx, stage, c.alice, "alice", c.alice.Send, "Hello, I am Alice. Shall we meet at noon?"); err != nil {
		return err
	}

	stage.scene("Bob has, too, and the bot's operator has compared keys with him: his master key is pinned in the configuration.")
	if err = c.say(ctx, stage, c.bob, "bob", c.bob.Send, "Noon is fine. Bring the contract."); err != nil {
		return err
	}

	stage.scene("Somebody has got hold of Bob's password and logs in as Bob, on a device that Bob has not confirmed.")
	within, cancel := context.WithTimeoutCause(ctx, patience, errors.New("nobody logged in"))
	defer cancel()
	if c.thief, err = people.Login(within, c.server.URL, "bob", password, people.Options{DeviceName: "some browser"}); err != nil {
		return err
	}
	for _, member := range []id.UserID{c.alice.UserID, c.bob.UserID, c.bot.UserID} {
		if err = c.thief.WaitJoined(within, c.room, member); err != nil {
			return err
		}
	}
	if err = c.say(ctx, stage, c.thief, "bob?", c.thief.Send, "Change of plan: send the contract to my new address."); err != nil {
		return err
	}

	stage.scene("A message in Alice's name comes without any encryption. Any of the servers could have written it.")
	if err = c.say(ctx, stage, c.alice, "alice?", c.alice.SendClear, "Yes, do what Bob says."); err != nil {
		return err
	}

	stage.scene("Whoever has Bob's password gives the account a new identity. Nobody says anything; the bot tells the room, and corrects what it said.")
	return c.reset(ctx, stage)
}

// reset gives Bob's account a new identity, and shows what the bot makes of it by itself.
func (c *cast) reset(ctx context.Context, stage *stage) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("the bot did not notice"))
	defer cancel()
	if _, err := c.bob.ResetIdentity(ctx); err != nil {
		return err
	}
	warning, err := c.alice.WaitForNotice(ctx, c.room)
	if err != nil {
		return err
	}
	stage.warning(botName, warning)
	corrected, err := c.alice.WaitForAnswerThat(ctx, c.bobSaid, func(answer people.Answer) bool { return answer.Edits > 0 })
	if err != nil {
		return err
	}
	stage.scene("Its answer to Bob's message of before reads now:")
	stage.answer(botName, corrected)
	return nil
}

// say lets a person say something, waits for the bot's answer as the people in the room read it, and shows both.
func (c *cast) say(
	ctx context.Context, stage *stage, speaker *people.Person, name string,
	send func(context.Context, id.RoomID, string) (id.EventID, error), text string,
) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("the bot did not answer"))
	defer cancel()
	stage.message(name, text)
	eventID, err := send(ctx, c.room, text)
	if err != nil {
		return err
	}
	answer, err := speaker.WaitForAnswer(ctx, eventID)
	if err != nil {
		return err
	}
	if speaker == c.bob {
		c.bobSaid = eventID
	}
	stage.answer(botName, answer)
	return nil
}

// keep tells how to log in, and waits until somebody presses Ctrl-C.
func (c *cast) keep(ctx context.Context, stage *stage) error {
	const guest = "guest"
	if err := c.server.Register(ctx, guest, password); err != nil {
		return err
	}
	if err := c.alice.Invite(ctx, c.room, id.NewUserID(guest, synapse.ServerName)); err != nil {
		return err
	}
	stage.title("Everything goes on running: log in with any Matrix client on this machine")
	stage.fact("Homeserver", c.server.URL)
	stage.fact("Accounts", "guest (invited to the room), alice, bob, "+botName)
	stage.fact("Password", password+" (of all of them)")
	stage.fact("Room", c.room.String())
	stage.fact("Bot", "invite @"+botName+":"+synapse.ServerName+" to any room of yours")
	stage.note("Press Ctrl-C to stop everything.")
	<-ctx.Done()
	return nil
}

// stop ends everything that was started, the last first.
func (c *cast) stop() error {
	if c.bot != nil {
		ctx, cancel := context.WithTimeoutCause(context.Background(), patience, errors.New("it took too long"))
		defer cancel()
		if _, _, err := c.bot.Stop(ctx); err != nil {
			c.bot.Kill()
		}
	}
	for _, person := range []*people.Person{c.alice, c.bob, c.thief} {
		if person != nil {
			person.Close()
		}
	}
	if c.server == nil {
		return nil
	}
	return c.server.Stop()
}

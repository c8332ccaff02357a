package e2e

import (
	"context"
	"os"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/element"
	"sendertrust/e2e/people"
)

// The ways by which the bot gets a key that its sender's device did not give it. Each of these messages is one that the bot sees, with a
// session that was shared before its device existed.

// hearsay is what the bot has to say of a message whose key somebody else gave it.
func hearsay(session id.SessionID) people.Annotation {
	return people.Annotation{
		Code: "authenticity_not_guaranteed", Shield: "grey", State: "unknown_device", SessionID: session, Legacy: true,
	}
}

// sharedBefore makes a room of alice's with an account that will be the bot's, and a session whose key that account's devices have.
func sharedBefore(t *testing.T, alice *people.Person, account *element.Client) (id.RoomID, *people.Session) {
	t.Helper()
	ctx := within(t, 2*patience)
	room := must(alice.CreateRoom(ctx, true, account.UserID()))(t)
	ok(t, account.Join(ctx, room))
	ok(t, alice.WaitJoined(ctx, room, account.UserID()))
	session := must(alice.NewSession(room))(t)
	ok(t, alice.ShareKey(ctx, session, account.UserID()))
	must(account.WaitForEvent(ctx, must(alice.SendWith(ctx, session, say("before the bot was there")))(t)))(t)
	return room, session
}

// newBotOf starts a bot of an account that has an identity already.
func (w *world) newBotOf(t *testing.T, userID id.UserID, recoveryKey string) *botproc.Bot {
	t.Helper()
	dir := must(os.MkdirTemp(w.dir, "bot-"))(t)
	bot := must(botproc.Start(within(t, patience), botproc.Options{
		Binary: w.binary, Homeserver: w.server.URL, UserID: userID, Password: password, Dir: dir,
		Configure: func(config botproc.Config) {
			config["account"].(botproc.Config)["recovery_key"] = recoveryKey
			config["encryption"].(botproc.Config)["wait"] = keyWait.String()
		},
	}))(t)
	// What its first /sync shows was said before its time.
	ok(t, bot.WaitForLog(within(t, patience), "/_matrix/client/v3/sync", "Request completed"))
	t.Cleanup(func() {
		bot.Kill()
		if err := bot.CheckLog(mark, password, recoveryKey); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			for _, line := range bot.LogMentioning("key") {
				t.Log(line)
			}
		}
	})
	return bot
}

// waitForBackup waits until the account's key backup has a session.
func waitForBackup(t *testing.T, w *world, account *element.Client, session *people.Session) {
	t.Helper()
	ctx := within(t, patience)
	client := must(mautrix.NewClient(w.server.URL, account.UserID(), account.AccessToken()))(t)
	again := time.NewTicker(200 * time.Millisecond)
	defer again.Stop()
	for {
		if inBackup(ctx, client, session) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal("Element did not back the session up: ", context.Cause(ctx))
		case <-again.C:
		}
	}
}

func inBackup(ctx context.Context, client *mautrix.Client, session *people.Session) bool {
	newest, err := client.GetKeyBackupLatestVersion(ctx)
	if err != nil {
		return false
	}
	_, err = client.GetKeyBackupForRoomAndSession(ctx, newest.Version, session.RoomID, session.ID)
	return err == nil
}

func expectHearsay(t *testing.T, bot *botproc.Bot, alice *people.Person, session *people.Session, because string) {
	t.Helper()
	eventID := must(alice.SendWith(within(t, patience), session, say("can the bot read this?")))(t)
	answer := expect(t, bot, alice, eventID, hearsay(session.ID))
	if !contains(answer.Body, because) {
		t.Errorf("the answer does not say %q: %s", because, answer.Body)
	}
	if answer.Sender != bot.UserID {
		t.Errorf("the answer is from %s", answer.Sender)
	}
}

func TestMissingKeyIsFoundInTheBackupOfElement(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	account := w.newElement(t, "backedup")
	_, recoveryKey, err := account.SetUpRecovery(within(t, patience), true)
	ok(t, err)
	_, session := sharedBefore(t, alice, account)
	waitForBackup(t, w, account, session)
	// No device is left that could be asked.
	ok(t, account.Logout(within(t, patience)))
	bot := w.newBotOf(t, account.UserID(), recoveryKey)
	expectHearsay(t, bot, alice, session, "key backup on the server")
}

func TestElementSendsAMissingKeyOn(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	account := w.newElement(t, "forwarding")
	_, recoveryKey, err := account.SetUpRecovery(within(t, patience), false)
	ok(t, err)
	_, session := sharedBefore(t, alice, account)
	bot := w.newBotOf(t, account.UserID(), recoveryKey)
	expectHearsay(t, bot, alice, session, "another device of this bot's own account")
}

// historyOf makes a room of the inviter's, in which alice has given the inviter alone a key that may be handed on (MSC4268).
func historyOf(t *testing.T, alice *people.Person, inviter *element.Client) (id.RoomID, *people.Session) {
	t.Helper()
	ctx := within(t, 2*patience)
	must(inviter.BootstrapCrossSigning(ctx))(t)
	room := must(inviter.CreateRoom(ctx, element.Room{Encrypted: true, Invite: []id.UserID{alice.UserID}}))(t)
	ok(t, alice.Join(ctx, room))
	ok(t, inviter.WaitForMember(ctx, room, alice.UserID))
	session := must(alice.NewSession(room))(t)
	ok(t, alice.ShareKey(ctx, session, inviter.UserID(),
		people.Set(true, "content", "shared_history"), people.Set(true, "content", "org.matrix.msc3061.shared_history")))
	must(inviter.WaitForEvent(ctx, must(alice.SendWith(ctx, session, say("before anybody else came")))(t)))(t)
	return room, session
}

// Who invites the bot with Element's "share history" gives it the keys of what others said before.
func TestElementGivesTheHistoryWithAnInvitation(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	inviter := w.newElement(t, "inviter")
	room, session := historyOf(t, alice, inviter)
	ctx := within(t, patience)
	ok(t, inviter.Invite(ctx, room, w.bot.UserID, true))
	ok(t, alice.WaitJoined(ctx, room, w.bot.UserID))
	expectHearsay(t, w.bot, alice, session, "the word of "+inviter.UserID().String())
}

package e2e

import (
	"testing"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/element"
	"sendertrust/e2e/people"
)

// newElement makes a person who uses Element's crypto, without a cross-signing identity.
func (w *world) newElement(t *testing.T, name string) *element.Client {
	t.Helper()
	return w.newElementDevice(t, must(w.register(within(t, patience), name))(t))
}

// newElementDevice makes a new device of an account. User is a localpart or a whole user ID.
func (w *world) newElementDevice(t *testing.T, user string) *element.Client {
	t.Helper()
	client := must(element.Start(within(t, startPatience), w.root, w.server.URL, user, password))(t)
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return client
}

// sessionOf reads which session an event was encrypted with.
func sessionOf(t *testing.T, observer *people.Person, room id.RoomID, eventID id.EventID) id.SessionID {
	t.Helper()
	evt := must(observer.Event(within(t, patience), room, eventID))(t)
	session, _ := evt.Content.Raw["session_id"].(string)
	return id.SessionID(session)
}

// What the homeserver no longer tells of a device, its message does (MSC4147): the bot is away while people log in, talk and log
// out.
func TestElementDeviceLoggedOutBeforeTheBotCouldAskIsKnownByItsMessage(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	bot := w.newBot(t, nil)
	room := newRoom(t, true, bot, alice)
	settle(t, alice, room)
	_, _, err := bot.Stop(within(t, patience))
	ok(t, err)

	ctx := within(t, 2*patience)
	signed, unsigned := w.newElement(t, "signed"), w.newElement(t, "unsigned")
	masterKey := must(signed.BootstrapCrossSigning(ctx))(t)
	sent := make(map[*element.Client]id.EventID)
	for _, guest := range []*element.Client{signed, unsigned} {
		ok(t, alice.Invite(ctx, room, guest.UserID()))
		ok(t, guest.Join(ctx, room))
		ok(t, guest.WaitForMember(ctx, room, bot.UserID))
		sent[guest] = must(guest.Send(ctx, room, say("I must go")))(t)
		ok(t, guest.Logout(ctx))
		devices := must(alice.Devices(ctx, guest.UserID()))(t)
		if len(devices) > 0 {
			t.Fatalf("%s still has the devices %v", guest.UserID(), devices)
		}
	}
	ok(t, bot.Restart(within(t, patience)))
	expect(t, bot, alice, sent[signed], people.Annotation{
		Code: "unverified_identity", Shield: "none", State: "sender_unverified",
		UserID: signed.UserID(), DeviceID: signed.DeviceID(), MasterKey: masterKey, SessionID: sessionOf(t, alice, room, sent[signed]),
	})
	expect(t, bot, alice, sent[unsigned], people.Annotation{
		Code: "unsigned_device", Shield: "red", State: "device_info",
		UserID: unsigned.UserID(), DeviceID: unsigned.DeviceID(), SessionID: sessionOf(t, alice, room, sent[unsigned]),
	})
}

func TestElementShowsNoWarningBesideTheBotsAnswers(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	client := w.newElement(t, "element")
	ctx := within(t, 2*patience)
	must(client.BootstrapCrossSigning(ctx))(t)
	room := must(client.CreateRoom(ctx, element.Room{Encrypted: true, Invite: []id.UserID{w.bot.UserID}}))(t)
	ok(t, client.WaitForMember(ctx, room, w.bot.UserID))
	answer := must(client.WaitForReply(ctx, must(client.Send(ctx, room, say("who am I?")))(t)))(t)
	if answer.Sender != w.bot.UserID || !answer.Encrypted {
		t.Errorf("the answer is %+v", answer)
	}
	none, unverified := element.Shield{Colour: "none"}, element.Shield{Colour: "red", Reason: "unverified_identity"}
	if shields := must(client.Shield(ctx, answer.EventID))(t); shields.Lax != none || shields.Strict != unverified {
		t.Errorf("before the bot is verified: %+v", shields)
	}
	must(client.VerifyUser(ctx, w.bot.UserID))(t)
	answer = must(client.WaitForReply(ctx, must(client.Send(ctx, room, say("and you?")))(t)))(t)
	if shields := must(client.Shield(ctx, answer.EventID))(t); shields.Lax != none {
		t.Errorf("after the bot was verified: %+v", shields)
	}
}

// A setting of Element's: never send encrypted messages to devices that are not verified.
func TestElementThatTrustsOnlyVerifiedDevicesIsUnableToDecrypt(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	client := w.newElement(t, "cautious")
	alice, _ := w.newStranger(t, "alice")
	ctx := within(t, 2*patience)
	must(client.BootstrapCrossSigning(ctx))(t)
	ok(t, client.SetBlacklistUnverified(ctx, true))
	room := newRoom(t, true, w.bot, alice)
	ok(t, alice.Invite(ctx, room, client.UserID()))
	ok(t, client.Join(ctx, room))
	ok(t, client.WaitForMember(ctx, room, w.bot.UserID))
	eventID := must(client.Send(ctx, room, say("for verified eyes only")))(t)
	session := sessionOf(t, alice, room, eventID)
	expectUnreadable(t, w.bot, alice, eventID, session, "only to devices that")
}

package e2e

import (
	"testing"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/people"
)

// proven is the annotation of a message from a device that its owner's identity has signed.
func proven(code, shield, state string, sender *people.Person, masterKey id.Ed25519, session id.SessionID) people.Annotation {
	return people.Annotation{
		Code: code, Shield: shield, State: state,
		UserID: sender.UserID, DeviceID: sender.DeviceID, MasterKey: masterKey, SessionID: session,
	}
}

func unverifiedIdentity(sender *people.Person, masterKey id.Ed25519, session id.SessionID) people.Annotation {
	return proven("unverified_identity", "none", "sender_unverified", sender, masterKey, session)
}

func unsignedDevice(sender *people.Person, session id.SessionID) people.Annotation {
	return proven("unsigned_device", "red", "device_info", sender, "", session)
}

func TestCrossSignedStrangerIsUnverifiedIdentity(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	first := must(alice.Send(within(t, patience), room, say("hello")))(t)
	second := must(alice.Send(within(t, patience), room, say("hello again")))(t)
	want := unverifiedIdentity(alice, masterKey, sessionID(t, alice, room))
	expect(t, w.bot, alice, first, want)
	expect(t, w.bot, alice, second, want)
	expectOnlyAnswers(t, alice, room, first, second)
}

// The sender is proven by what the server publishes about the device as well as by what the message embeds (seed, step B).
func TestCrossSignedStrangerWithoutEmbeddedKeysIsUnverifiedIdentity(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	session := must(alice.NewSession(room))(t)
	ok(t, alice.ShareKey(within(t, patience), session, w.bot.UserID, people.OmitDeviceKeys()))
	eventID := must(alice.SendWith(within(t, patience), session, say("an old client")))(t)
	expect(t, w.bot, alice, eventID, unverifiedIdentity(alice, masterKey, session.ID))
}

func TestPinnedPersonIsVerified(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	room := newRoom(t, true, w.bot, w.verified)
	eventID := must(w.verified.Send(within(t, patience), room, say("it is me")))(t)
	session := sessionID(t, w.verified, room)
	expect(t, w.bot, w.verified, eventID, proven("verified", "none", "sender_verified", w.verified, w.verifiedKey, session))
}

func TestDeviceWithoutCrossSigningIsUnsigned(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bob := w.newPerson(t, "bob")
	room := newRoom(t, true, w.bot, bob)
	eventID := must(bob.Send(within(t, patience), room, say("no identity")))(t)
	expect(t, w.bot, bob, eventID, unsignedDevice(bob, sessionID(t, bob, room)))
}

func TestUnsignedSecondDeviceOfVerifiedUserIsUnsigned(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	second := w.login(t, w.verified.UserID.String(), people.Options{})
	room := newRoom(t, true, w.bot, second)
	eventID := must(second.Send(within(t, patience), room, say("whoever I am")))(t)
	expect(t, w.bot, second, eventID, unsignedDevice(second, sessionID(t, second, room)))
}

// A device that has published nothing, and embeds nothing, is unknown however long one asks (seed, steps A, B, C).
func TestUnpublishedDeviceIsUnknown(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	ghost := w.login(t, alice.UserID.String(), people.Options{Unpublished: true})
	session := must(ghost.NewSession(room))(t)
	ok(t, ghost.ShareKey(within(t, patience), session, w.bot.UserID, people.OmitDeviceKeys()))
	eventID := must(ghost.SendWith(within(t, patience), session, say("boo")))(t)
	expect(t, w.bot, alice, eventID, people.Annotation{
		Code: "unknown_device", Shield: "red", State: "unknown_device", UserID: alice.UserID, SessionID: session.ID,
	})
}

func TestPinnedUserWithNewIdentityIsViolationOnOldAndFreshSession(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	carol := w.resetting
	room := newRoom(t, true, w.bot, carol)
	ctx := within(t, patience)
	before := must(carol.Send(ctx, room, say("still me")))(t)
	oldSession := sessionID(t, carol, room)
	expect(t, w.bot, carol, before, proven("verified", "none", "sender_verified", carol, w.resettingKey, oldSession))

	newKey := must(carol.ResetIdentity(ctx))(t)
	onOld := must(carol.Send(ctx, room, say("still me?")))(t)
	expect(t, w.bot, carol, onOld, proven("verification_violation", "red", "verification_violation", carol, w.resettingKey, oldSession))

	carol.RotateSession(room)
	onFresh := must(carol.Send(ctx, room, say("me, really")))(t)
	expect(t, w.bot, carol, onFresh, proven("verification_violation", "red", "verification_violation", carol, newKey, sessionID(t, carol, room)))
}

func TestStrangerWithNewIdentityHasChanged(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	ctx := within(t, patience)
	before := must(alice.Send(ctx, room, say("me")))(t)
	oldSession := sessionID(t, alice, room)
	expect(t, w.bot, alice, before, unverifiedIdentity(alice, masterKey, oldSession))

	newKey := must(alice.ResetIdentity(ctx))(t)
	onOld := must(alice.Send(ctx, room, say("me?")))(t)
	expect(t, w.bot, alice, onOld, proven("identity_changed", "grey", "sender_unverified", alice, masterKey, oldSession))

	alice.RotateSession(room)
	onFresh := must(alice.Send(ctx, room, say("me!")))(t)
	expect(t, w.bot, alice, onFresh, proven("identity_changed", "grey", "sender_unverified", alice, newKey, sessionID(t, alice, room)))
}

func TestEventSentOnByAnotherMemberIsMismatched(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	mallory, _ := w.newStranger(t, "mallory")
	room := newRoom(t, true, w.bot, alice, mallory)
	ctx := within(t, patience)
	original := must(alice.Send(ctx, room, say("I owe Mallory nothing")))(t)
	session := sessionID(t, alice, room)
	expect(t, w.bot, alice, original, unverifiedIdentity(alice, masterKey, session))
	resent := must(mallory.Resend(ctx, room, original))(t)
	expect(t, w.bot, alice, resent, proven("mismatched_sender", "red", "sender_unverified", alice, masterKey, session))
	expectOnlyAnswers(t, alice, room, original, resent)
}

// Whoever holds the session's key can encrypt with it; only its owner may be believed.
func TestFreshCiphertextUnderAnotherNameIsMismatched(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	mallory, _ := w.newStranger(t, "mallory")
	room := newRoom(t, true, w.bot, alice, mallory)
	ctx := within(t, patience)
	session := must(alice.NewSession(room))(t)
	ok(t, alice.ShareKey(ctx, session, w.bot.UserID))
	encrypted := must(alice.Encrypt(session, "m.room.message", map[string]any{"msgtype": "m.text", "body": say("intercepted")}))(t)
	eventID := must(mallory.SendRaw(ctx, room, "m.room.encrypted", encrypted))(t)
	expect(t, w.bot, alice, eventID, proven("mismatched_sender", "red", "sender_unverified", alice, masterKey, session.ID))
}

func TestMessageIndexInAnotherEventIsMismatched(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	ctx := within(t, patience)
	original := must(alice.Send(ctx, room, say("once")))(t)
	session := sessionID(t, alice, room)
	expect(t, w.bot, alice, original, unverifiedIdentity(alice, masterKey, session))
	repeated := must(alice.Resend(ctx, room, original))(t)
	expect(t, w.bot, alice, repeated, proven("mismatched_sender", "red", "sender_unverified", alice, masterKey, session))
	expectOnlyAnswers(t, alice, room, original, repeated)
}

func TestPlaintextInEncryptedRoomIsSentInClear(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	eventID := must(alice.SendClear(within(t, patience), room, say("oops")))(t)
	expect(t, w.bot, alice, eventID, people.Annotation{Code: "sent_in_clear", Shield: "red"})
	expectOnlyAnswers(t, alice, room, eventID)
}

// A second device that sends another's session key as its own is not believed, and casts no doubt on more than that session.
func TestSessionClaimedByTwoDevicesIsInConflict(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	mallory, _ := w.newStranger(t, "mallory")
	room := newRoom(t, true, w.bot, alice, mallory)
	ctx := within(t, patience)
	session := must(alice.CurrentSession(ctx, room))(t)
	before := must(alice.Send(ctx, room, say("mine")))(t)
	expect(t, w.bot, alice, before, unverifiedIdentity(alice, masterKey, session.ID))

	ok(t, mallory.ShareKey(ctx, session, w.bot.UserID))
	settle(t, mallory, room) // the bot has received the claim
	disputed := must(alice.Send(ctx, room, say("mine, I said")))(t)
	answer := *must(alice.WaitForAnswer(ctx, disputed))(t)
	if answer.Annotation.Code != "session_conflict" || answer.Annotation.Shield != "red" || answer.Malformed != nil {
		t.Errorf("annotation %+v (%v)", answer.Annotation, answer.Malformed)
	}
	for _, claimant := range []*people.Person{alice, mallory} {
		if !contains(answer.Body, claimant.UserID.String(), claimant.DeviceID.String()) {
			t.Errorf("the answer does not name %s %s: %s", claimant.UserID, claimant.DeviceID, answer.Body)
		}
	}
	alice.RotateSession(room)
	fresh := must(alice.Send(ctx, room, say("a new one, then")))(t)
	expect(t, w.bot, alice, fresh, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
}

package e2e

import (
	"database/sql"
	"strings"
	"testing"
	"time"

	_ "github.com/mattn/go-sqlite3"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// contains says whether a text has all the words.
func contains(text string, words ...string) bool {
	for _, word := range words {
		if !strings.Contains(text, word) {
			return false
		}
	}
	return true
}

// expectUnreadable waits until the bot has given up on an event, and makes sure that it says why.
func expectUnreadable(t *testing.T, bot *botproc.Bot, observer *people.Person, eventID id.EventID, session id.SessionID, because string) people.Answer {
	t.Helper()
	answer := *must(observer.WaitForAnswer(within(t, patience), eventID))(t)
	got := answer.Annotation
	if got.Code != "unable_to_decrypt" || got.Shield != "red" || got.SessionID != session || answer.Malformed != nil || answer.Sender != bot.UserID {
		t.Errorf("annotation %+v of %s (%v)", got, answer.Sender, answer.Malformed)
	}
	if !contains(answer.Body, because) {
		t.Errorf("the answer does not say %q: %s", because, answer.Body)
	}
	return answer
}

func TestKeyThatNeverArrivesIsUnableToDecrypt(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	begin := time.Now()
	eventID, session, err := alice.SendWithoutKey(within(t, patience), room, say("can you hear me?"))
	ok(t, err)
	expectUnreadable(t, w.bot, alice, eventID, session.ID, "key has not come")
	if waited := time.Since(begin); waited < keyWait {
		t.Errorf("the bot gave up after %v, not after %v", waited, keyWait)
	}
}

func TestWithheldKeyIsUnableToDecryptWithTheReason(t *testing.T) {
	for code, because := range map[event.RoomKeyWithheldCode]string{
		event.RoomKeyWithheldBlacklisted:  "blocked this bot",
		event.RoomKeyWithheldUnverified:   "only to devices that",
		event.RoomKeyWithheldUnauthorized: "may not read",
		event.RoomKeyWithheldNoOlmSession: "secure connection",
	} {
		t.Run(string(code), func(t *testing.T) {
			t.Parallel()
			w := theWorld(t)
			alice, _ := w.newStranger(t, "alice")
			room := newRoom(t, true, w.bot, alice)
			session := must(alice.NewSession(room))(t)
			ok(t, alice.Withhold(within(t, patience), session, w.bot.UserID, code))
			eventID := must(alice.SendWith(within(t, patience), session, say("not for bots")))(t)
			expectUnreadable(t, w.bot, alice, eventID, session.ID, because)
		})
	}
}

// lateBy lets time pass, for what is to come late.
func lateBy(t *testing.T, delay time.Duration) {
	t.Helper()
	late := time.NewTimer(delay)
	defer late.Stop()
	select {
	case <-late.C:
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
}

func TestKeyFiveSecondsAfterTheMessageGivesTheRightVerdictOnly(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	ctx := within(t, patience)
	eventID, session, err := alice.SendWithoutKey(ctx, room, say("a moment"))
	ok(t, err)
	lateBy(t, 5*time.Second)
	ok(t, alice.ShareKey(ctx, session, w.bot.UserID))
	want := unverifiedIdentity(alice, masterKey, session.ID)
	want.EventID = eventID
	answer := must(alice.WaitForAnswerThat(ctx, eventID, func(a people.Answer) bool { return a.Annotation.Code == want.Code }))(t)
	if answer.Annotation != want || answer.Malformed != nil {
		t.Errorf("annotation\n got %+v (%v)\nwant %+v", answer.Annotation, answer.Malformed, want)
	}
	expectOnlyAnswers(t, alice, room, eventID)
}

func TestKeyOfLaterMessagesIsUnableToDecryptEarlierOnes(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	ctx := within(t, patience)
	session := must(alice.NewSession(room))(t)
	must(alice.Encrypt(session, "m.room.message", map[string]any{"body": say("never sent")}))(t)
	earlier := must(alice.Encrypt(session, "m.room.message", map[string]any{"msgtype": "m.text", "body": say("before you")}))(t)
	ok(t, alice.ShareKey(ctx, session, w.bot.UserID, people.Set(session.CurrentKey(), "content", "session_key")))
	unreadable := must(alice.SendRaw(ctx, room, "m.room.encrypted", earlier))(t)
	readable := must(alice.SendWith(ctx, session, say("with you")))(t)
	expect(t, w.bot, alice, readable, unverifiedIdentity(alice, masterKey, session.ID))
	expectUnreadable(t, w.bot, alice, unreadable, session.ID, "opens later messages only")
}

// A signature that claims to be the account's own, and is not, is the one thing that condemns a session (seed, step H).
func TestForgedSelfSigningSignatureIsRejected(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	thief := w.login(t, alice.UserID.String(), people.Options{})
	room := newRoom(t, true, w.bot, alice)
	ctx := within(t, patience)
	settle(t, alice, room)
	session := must(thief.NewSession(room))(t)
	ok(t, thief.ShareKey(ctx, session, w.bot.UserID, people.ForgeSelfSigningSignature(alice.SelfSigningKey())))
	eventID := must(thief.SendWith(ctx, session, say("trust me")))(t)
	answer := *must(alice.WaitForAnswer(ctx, eventID))(t)
	got := answer.Annotation
	if got.Code != "session_rejected" || got.Shield != "red" || got.State != "rejected" || got.SessionID != session.ID || answer.Malformed != nil {
		t.Errorf("annotation %+v (%v)", got, answer.Malformed)
	}
	if contains(answer.Body, mark) || contains(answer.FormattedBody, mark) {
		t.Error("the answer shows the content")
	}
	state, kept := storedSession(t, w.bot, session.ID)
	if state != "rejected" || kept {
		t.Errorf("the database has the session as %q, with its key: %v", state, kept)
	}
	honest := must(alice.Send(ctx, room, say("this is me")))(t)
	expect(t, w.bot, alice, honest, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
}

// storedSession reads what a bot's database has of a session: the state of its sender data, and whether there is a key.
func storedSession(t *testing.T, bot *botproc.Bot, session id.SessionID) (state string, hasKey bool) {
	t.Helper()
	db := must(sql.Open("sqlite3", "file:"+bot.DBPath()+"?mode=ro"))(t)
	defer db.Close()
	ctx := within(t, patience)
	ok(t, db.QueryRowContext(ctx, "SELECT state FROM sendertrust_session WHERE session_id=?", session).Scan(&state))
	ok(t, db.QueryRowContext(ctx, "SELECT EXISTS(SELECT 1 FROM crypto_megolm_inbound_session WHERE session_id=? AND session IS NOT NULL)", session).Scan(&hasKey))
	return state, hasKey
}

// What MSC4147 says must hold of embedded device keys; where it does not, the whole room key is refused.
func TestRoomKeyWithWrongDeviceKeysIsRefused(t *testing.T) {
	for name, forgery := range map[string]people.Forgery{
		"of another user":         people.DeviceKeysOf("@somebody:localhost"),
		"another curve25519 key":  people.WrongCurve25519(),
		"another ed25519 key":     people.WrongEd25519(),
		"broken device signature": people.BreakDeviceSignature(),
	} {
		t.Run(name, func(t *testing.T) { t.Parallel(); expectKeyRefused(t, forgery, "key has not come") })
	}
}

// An Olm message says whom it is from, whom it is for and which room its key is for; what does not fit is refused.
func TestRoomKeyThatWasNotMeantForUsIsRefused(t *testing.T) {
	for name, forgery := range map[string]people.Forgery{
		"from another sender":   people.Set("@somebody:localhost", "sender"),
		"for another user":      people.Set("@somebody:localhost", "recipient"),
		"for another device":    people.Set("YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXoxMjM0NTY", "recipient_keys", "ed25519"),
		"of another session ID": people.Set("YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXoxMjM0NTY", "content", "session_id"),
		"of another algorithm":  people.Set("m.megolm.v9", "content", "algorithm"),
	} {
		t.Run(name, func(t *testing.T) { t.Parallel(); expectKeyRefused(t, forgery, "key has not come") })
	}
}

// A key opens what is in its own room only.
func TestRoomKeyForAnotherRoomIsRefused(t *testing.T) {
	t.Parallel()
	expectKeyRefused(t, people.Set("!elsewhere:localhost", "content", "room_id"), "written for another room")
}

// expectKeyRefused shares a key with a forgery, and makes sure that the bot does not use it, but uses the honest one after it.
func expectKeyRefused(t *testing.T, forgery people.Forgery, says string) {
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	ctx := within(t, patience)
	eventID, session, err := alice.SendWithoutKey(ctx, room, say("forged"))
	ok(t, err)
	ok(t, alice.ShareKey(ctx, session, w.bot.UserID, forgery))
	expectUnreadable(t, w.bot, alice, eventID, session.ID, says)
	honest := must(alice.Send(ctx, room, say("honest")))(t)
	expect(t, w.bot, alice, honest, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
}

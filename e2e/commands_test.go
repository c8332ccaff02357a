package e2e

import (
	"bytes"
	"encoding/json"
	"image"
	_ "image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/makiuchi-d/gozxing"
	"github.com/makiuchi-d/gozxing/qrcode"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// What everybody may ask the bot, as strangers ask it in an encrypted room.

// ask sends a command and waits for its answer, which has to come encrypted and to say all of that.
func ask(t *testing.T, asker *people.Person, room id.RoomID, about id.EventID, command string, says ...string) (id.EventID, people.Answer) {
	t.Helper()
	ctx := within(t, patience)
	send := func() (id.EventID, error) { return asker.Send(ctx, room, command) }
	if about != "" {
		send = func() (id.EventID, error) { return asker.SendReply(ctx, room, about, command) }
	}
	eventID := must(send())(t)
	answer := *must(asker.WaitForAnswer(ctx, eventID))(t)
	if !answer.Encrypted || answer.MsgType != event.MsgNotice || answer.InReplyTo != eventID || answer.Malformed != nil || answer.Annotation.EventID != eventID {
		t.Errorf("the answer to %s: %+v", command, answer)
	}
	if !contains(answer.Body, says...) {
		t.Errorf("the answer to %s does not say %q:\n%s", command, says, answer.Body)
	}
	if len(answer.Body)+len(answer.FormattedBody) > 32*1024 {
		t.Errorf("the answer to %s is %d bytes long", command, len(answer.Body)+len(answer.FormattedBody))
	}
	return eventID, answer
}

func groupsOfFour(key string) string {
	var written strings.Builder
	for i, letter := range key {
		if i > 0 && i%4 == 0 {
			written.WriteByte(' ')
		}
		written.WriteRune(letter)
	}
	return written.String()
}

// botKeys are the master key and the device key of a bot, as the homeserver shows them.
func botKeys(t *testing.T, observer *people.Person, bot *botproc.Bot) (masterKey, deviceID, deviceKey string) {
	t.Helper()
	devices := must(observer.Devices(within(t, patience), bot.UserID))(t)
	if len(devices) != 1 {
		t.Fatalf("the bot has the devices %v", devices)
	}
	return masterKeyOf(t, observer, bot.UserID), devices[0].DeviceID.String(), devices[0].SigningKey.String()
}

func TestStrangersAreToldTheProofOfAMessage(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, aliceKey := w.newStranger(t, "alice")
	bob := w.newPerson(t, "bob")
	room := newRoom(t, true, w.bot, alice, bob, w.verified)
	ctx := within(t, 3*patience)

	bobs := must(bob.Send(ctx, room, say("anybody could have added me")))(t)
	answer := expect(t, w.bot, alice, bobs, unsignedDevice(bob, sessionID(t, bob, room)))
	for _, about := range []id.EventID{bobs, answer.EventID} {
		_, explained := ask(t, alice, room, about, "!trust explain",
			"Sent from a device that "+bob.UserID.String()+" has not confirmed.", bob.DeviceID.String(), groupsOfFour(bob.SigningKey().String()),
			"came directly from the device", "Do not rely on this message", sessionID(t, bob, room).String(), "A:")
		if !contains(explained.FormattedBody, "<ol>", "<details>") {
			t.Errorf("HTML: %s", explained.FormattedBody)
		}
	}
	alices := must(alice.Send(ctx, room, say("it is me")))(t)
	ask(t, bob, room, alices, "!trust explain", "From the account "+alice.UserID.String()+", not verified in person.",
		groupsOfFour(aliceKey.String()), groupsOfFour(alice.SelfSigningKey().String()), "Nobody has checked for me", "I saw the key of this account first on 20")
	verified := must(w.verified.Send(ctx, room, say("everybody knows me")))(t)
	ask(t, alice, room, verified, "!trust explain", "Verified: this is really "+w.verified.UserID.String(), "my configuration names it", groupsOfFour(w.verifiedKey.String()))

	unreadable, _, err := alice.SendWithoutKey(ctx, room, say("later"))
	ok(t, err)
	must(bob.WaitForAnswer(ctx, unreadable))(t)
	ask(t, bob, room, unreadable, "!trust explain", "I cannot read this message.", "Its key has not come.")

	ask(t, alice, room, "", "!trust explain", "Which message do you mean?")
	ask(t, alice, room, "$there-is-no-such-event", "!trust explain", "I cannot find that message.")
	_, help := ask(t, alice, room, "", "!trust help", "!trust explain", "!trust proof", "names none")
	ask(t, alice, room, help.EventID, "!trust explain", alice.UserID.String()) // the message that asked for help

	reaction := must(bob.SendReaction(ctx, room, alices, "👍"))(t)
	ask(t, alice, room, reaction, "!trust explain", "That is not a message.", "m.reaction")
	state := must(alice.Client.SendStateEvent(ctx, room, event.StateTopic, "", map[string]any{"topic": "t"}))(t)
	ask(t, alice, room, state.EventID, "!trust explain", "a change of the room", "m.room.topic")
	deleted := must(alice.Send(ctx, room, say("oops")))(t)
	must(alice.WaitForAnswer(ctx, deleted))(t)
	must(alice.Client.RedactEvent(ctx, room, deleted))(t)
	ask(t, alice, room, deleted, "!trust explain", "That message was deleted.")
}

func TestStrangersAreToldWhoIsWho(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, aliceKey := w.newStranger(t, "alice")
	bob := w.newPerson(t, "bob")
	carol, _ := w.newStranger(t, "carol")
	room := newRoom(t, true, w.bot, alice, bob, w.verified)
	settle(t, alice, room)
	settle(t, bob, room)

	ask(t, alice, room, "", "!trust user", alice.UserID.String()+" is not verified in person.", groupsOfFour(aliceKey.String()),
		alice.DeviceID.String()+": confirmed by the owner", "One device:")
	ask(t, alice, room, "", "!trust user "+bob.UserID.String(), bob.UserID.String()+" has not set up an identity.", bob.DeviceID.String()+": NOT confirmed")
	ask(t, alice, room, "", "!trust user "+w.verified.UserID.String(), "is verified.", "my configuration names", groupsOfFour(w.verifiedKey.String()))
	ask(t, alice, room, "", "!trust user "+w.bot.UserID.String(), "That is me.", "!trust status")
	newRoom(t, true, w.bot, carol, w.verified) // whom the bot knows from there is not told here
	ok(t, alice.Invite(within(t, patience), room, carol.UserID))
	ask(t, alice, room, "", "!trust user "+carol.UserID.String(), carol.UserID.String()+" has not joined this room.")
	ask(t, alice, room, "", "!trust user Bob", "is not a Matrix ID")
	ask(t, alice, room, "", "!trust user @аlice:localhost", "has not joined this room", "U+0430")

	ask(t, alice, room, "", "!trust room", "There are 4 members", "The room is encrypted.", "Of one member I cannot check",
		"⚠️ "+bob.UserID.String()+" · no identity set up · 0 confirmed, 1 not", "✅ "+w.verified.UserID.String()+" · verified", "me, this bot")

	// Who calls themselves like another is found out.
	callOneself(t, bob, room, strings.ToUpper(alice.UserID.Localpart()))
	settle(t, bob, room)
	ask(t, alice, room, "", "!trust user "+bob.UserID.String(), "cannot be told apart from that of "+alice.UserID.String())
}

// Who was verified in a chat is told by whom, and a key that changes is told of with the time.
func TestStrangersAreToldWhoVerifiedAndWhatHasChanged(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	olga, olgaKey := w.newStranger(t, "olga")
	alice, aliceKey := w.newStranger(t, "alice")
	bob, _ := w.newStranger(t, "bob")
	bot := w.newBot(t, func(config botproc.Config) {
		pin(config, olga.UserID, olgaKey)
		config["trust"].(botproc.Config)["operators"] = []string{olga.UserID.String()}
	})
	room := newRoom(t, true, bot, olga, alice, bob)
	ctx := within(t, 3*patience)
	about := must(alice.Send(ctx, room, say("who knows me?")))(t)
	must(bob.WaitForAnswer(ctx, about))(t)
	ask(t, bob, room, about, "!trust explain", "Nobody has checked for me")
	ask(t, olga, room, "", "!trust verify "+alice.UserID.String()+" "+groupsOfFour(aliceKey.String()), "is verified now")
	named := olga.UserID.String() + ", an operator of this bot, has verified " + alice.UserID.String() + " in a chat with me on 20"
	ask(t, bob, room, about, "!trust explain", "Verified: this is really "+alice.UserID.String(), named, "from the device "+olga.DeviceID.String())
	ask(t, bob, room, "", "!trust user "+alice.UserID.String(), "is verified.", named)
	ask(t, olga, room, "", "!trust help", "!trust unverify")
	ask(t, bob, room, "", "!trust help", "more commands for my operators: "+olga.UserID.String())

	settle(t, bob, room)
	newKey := must(bob.ResetIdentity(ctx))(t)
	bob.RotateSession(room)
	changed := must(bob.Send(ctx, room, say("me, anew")))(t)
	must(alice.WaitForAnswer(ctx, changed))(t)
	ask(t, alice, room, changed, "!trust explain", "The identity of "+bob.UserID.String()+" has changed.", "has changed since I know it: on 20", "to "+groupsOfFour(newKey.String()))
	ask(t, alice, room, "", "!trust user "+bob.UserID.String(), "The identity of "+bob.UserID.String()+" has changed.", "to "+groupsOfFour(newKey.String()))
	ask(t, alice, room, "", "!trust room", "identity has changed", "The room is encrypted.")

	// An operator may ask about strangers, too.
	carol, carolKey := w.newStranger(t, "carol")
	ask(t, alice, room, "", "!trust user "+carol.UserID.String(), "has not joined this room")
	ask(t, olga, room, "", "!trust user "+carol.UserID.String(), "is not verified in person.", groupsOfFour(carolKey.String()))
	ask(t, olga, room, "", "!trust user @nobody-at-all:localhost", "I know nothing of @nobody-at-all:localhost.")
}

// callOneself gives somebody a display name in a room.
func callOneself(t *testing.T, person *people.Person, room id.RoomID, name string) {
	t.Helper()
	content := &event.MemberEventContent{Membership: event.MembershipJoin, Displayname: name}
	must(person.Client.SendStateEvent(within(t, patience), room, event.StateMember, person.UserID.String(), content))(t)
}

func TestBotShowsItsOwnKeysAsTextAndPicture(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	masterKey, deviceID, deviceKey := botKeys(t, alice, w.bot)
	eventID, _ := ask(t, alice, room, "", "!trust status", "I am "+w.bot.UserID.String(), groupsOfFour(masterKey), deviceID, groupsOfFour(deviceKey),
		"The server shows the same keys", "Running since 20", "In this room I answer every message.", "I have no operators.")
	file := must(alice.WaitForFile(within(t, patience), room, eventID))(t)
	if !file.Encrypted || !file.FileEncrypted || file.MsgType != event.MsgImage || file.MimeType != "image/png" || file.Sender != w.bot.UserID {
		t.Errorf("the picture: %s %s of %s, encrypted: %v, %v", file.MsgType, file.MimeType, file.Sender, file.Encrypted, file.FileEncrypted)
	}
	want := w.bot.UserID.String() + "\nmaster key: " + groupsOfFour(masterKey) + "\ndevice: " + deviceID + "\ndevice key: " + groupsOfFour(deviceKey)
	if read := readQR(t, file.Data).GetText(); read != want {
		t.Errorf("the code says %q, and should say %q", read, want)
	}

	clear := newRoom(t, false, w.bot, alice)
	unencrypted := must(alice.SendClear(within(t, patience), clear, "!trust status"))(t)
	picture := must(alice.WaitForFile(within(t, patience), clear, unencrypted))(t)
	if picture.Encrypted || picture.FileEncrypted || readQR(t, picture.Data).GetText() != want {
		t.Errorf("in a room that is not encrypted: %+v", picture)
	}
}

// readQR gives what an app that reads such codes shows.
func readQR(t *testing.T, picture []byte) *gozxing.Result {
	t.Helper()
	painted, _, err := image.Decode(bytes.NewReader(picture))
	ok(t, err)
	bitmap := must(gozxing.NewBinaryBitmapFromImage(painted))(t)
	// It is told that there is nothing but the code in the picture: one code in thirty has dots that it would take for corners.
	return must(qrcode.NewQRCodeReader().Decode(bitmap, map[gozxing.DecodeHintType]any{gozxing.DecodeHintType_PURE_BARCODE: true}))(t)
}

// verifyProof runs the program on a proof as somebody does who has nothing but the file and the bot's key.
func (w *world) verifyProof(t *testing.T, proof []byte, masterKey string) (output string, err error) {
	t.Helper()
	dir := t.TempDir()
	ok(t, os.WriteFile(filepath.Join(dir, "proof.json"), proof, 0o600))
	command := exec.CommandContext(within(t, patience), w.binary, "--verify-proof", "proof.json", "--master-key", masterKey)
	command.Dir, command.Env = dir, []string{}
	said, err := command.CombinedOutput()
	left, readErr := os.ReadDir(dir)
	ok(t, readErr)
	if len(left) != 1 {
		t.Errorf("it has left %v", left)
	}
	return string(said), err
}

func TestProofIsCheckedByTheProgramAlone(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice, w.verified)
	masterKey, _, _ := botKeys(t, alice, w.bot)
	ctx := within(t, 2*patience)
	secret := say("the text is not in the proof")
	about := must(w.verified.Send(ctx, room, secret))(t)
	must(alice.WaitForAnswer(ctx, about))(t)
	asked, answer := ask(t, alice, room, about, "!trust proof", "Here is the proof.", "--verify-proof", masterKey, "It does not prove what the message says.")
	file := must(alice.WaitForFile(ctx, room, asked))(t)
	if !file.Encrypted || !file.FileEncrypted || file.MsgType != event.MsgFile || file.MimeType != "application/json" || !json.Valid(file.Data) ||
		!strings.HasPrefix(file.Name, "sendertrust-proof-") || !contains(answer.Body, file.Name) {
		t.Errorf("the file: %+v", file)
	}
	if bytes.Contains(file.Data, []byte(mark)) {
		t.Error("the text is in the proof")
	}
	said, err := w.verifyProof(t, file.Data, masterKey)
	if err != nil || !contains(said, w.verified.UserID.String(), w.verified.DeviceID.String()) {
		t.Errorf("the program says (%v): %s", err, said)
	}
	tampered := bytes.ReplaceAll(file.Data, []byte(w.verified.DeviceID), []byte("OTHERDEVIC"))
	if said, err = w.verifyProof(t, tampered, masterKey); err == nil {
		t.Errorf("of a file that was changed the program says: %s", said)
	}
	if said, err = w.verifyProof(t, file.Data, w.verifiedKey.String()); err == nil {
		t.Errorf("with another key the program says: %s", said)
	}

	clear := must(alice.SendClear(ctx, room, say("unsigned")))(t)
	must(alice.WaitForAnswer(ctx, clear))(t)
	ask(t, alice, room, clear, "!trust proof", "There is no proof of that message.", "It was not encrypted")
	ask(t, alice, room, "", "!trust proof", "Which message do you mean?")
	ask(t, alice, room, answer.EventID, "!trust proof", "Here is the proof.") // of the message that asked for one
}

// Whatever somebody writes, or is called: the answer is short, says what is wrong, and carries nothing of it that could do harm.
func TestCommandsBearHostileInput(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	mallory, _ := w.newStranger(t, "mallory")
	room := newRoom(t, true, w.bot, mallory)
	ctx := within(t, 3*patience)
	callOneself(t, mallory, room, "<b>\u202e"+w.bot.UserID.String()+"» ✅ verified «")
	settle(t, mallory, room)
	for _, command := range []string{
		"!trust user @\u202eecila:localhost", "!trust user <img src=x>", "!trust user " + strings.Repeat("@x", 19_000), "!trust user @x:localhost " + strings.Repeat("y", 40_000),
		"!trust explain " + strings.Repeat("z", 40_000), "!trust room \x00", "!trust status '\"`$(reboot)", "!trust proof $$$", "!trust user", "!trust user @" + strings.Repeat("x", 240) + ":localhost",
	} {
		eventID := must(mallory.Send(ctx, room, command))(t)
		answer := *must(mallory.WaitForAnswer(ctx, eventID))(t)
		if strings.Contains(answer.FormattedBody, "<img") || strings.Contains(answer.FormattedBody, "<b>") || strings.Contains(answer.Body, "\u202e") {
			t.Errorf("%.60q: %s", command, answer.FormattedBody)
		}
		if size := len(answer.Body) + len(answer.FormattedBody); size > 16*1024 || size < 40 {
			t.Errorf("%.60q: %d bytes", command, size)
		}
	}
	for _, about := range []any{"", "$", 17, map[string]any{}, strings.Repeat("$x", 10_000), "$../../../_matrix/client/v3/account/whoami?"} {
		content := map[string]any{"msgtype": "m.text", "body": "!trust explain", "m.relates_to": map[string]any{"m.in_reply_to": map[string]any{"event_id": about}}}
		eventID, err := mallory.SendContent(ctx, room, content)
		if err != nil {
			continue // the homeserver does not take it
		}
		answer := *must(mallory.WaitForAnswer(ctx, eventID))(t)
		if code := answer.Annotation.Code; code != "unverified_identity" && code != "unable_to_decrypt" {
			t.Errorf("a reply to %.40v: %s", about, answer.Body)
		}
	}
}

// The same with Element: what it shows of the bot's answers, its picture and its file has no warning.
func TestElementReadsTheAnswersToCommands(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	ellen := w.newElement(t, "ellen")
	ctx := within(t, 4*patience)
	must(ellen.BootstrapCrossSigning(ctx))(t)
	room := newRoom(t, true, w.bot, alice)
	ok(t, alice.Invite(ctx, room, ellen.UserID()))
	ok(t, ellen.Join(ctx, room))
	ok(t, ellen.WaitForMember(ctx, room, w.bot.UserID))
	ok(t, alice.WaitJoined(ctx, room, ellen.UserID()))
	about := must(alice.Send(ctx, room, say("who am I?")))(t)
	must(alice.WaitForAnswer(ctx, about))(t)
	for command, says := range map[string]string{
		"explain": alice.UserID.String(), "proof": "--verify-proof", "user": ellen.DeviceID().String(), "room": "There are 3 members", "status": w.bot.UserID.String(), "help": "!trust room",
	} {
		content := map[string]any{"msgtype": "m.text", "body": "!trust " + command}
		if command == "explain" || command == "proof" {
			content["m.relates_to"] = map[string]any{"m.in_reply_to": map[string]any{"event_id": about}}
		}
		asked := must(ellen.SendRaw(ctx, room, event.EventMessage, content))(t)
		reply := must(ellen.WaitForReply(ctx, asked))(t)
		var said struct {
			Body string `json:"body"`
		}
		ok(t, json.Unmarshal(reply.Content, &said))
		if !strings.Contains(said.Body, says) || !reply.Encrypted || reply.Shield.Colour != "none" {
			t.Errorf("%s: %+v: %s", command, reply.Shield, said.Body)
		}
		if command != "status" && command != "proof" {
			continue
		}
		file := must(alice.WaitForFile(ctx, room, asked))(t)
		shown := must(ellen.WaitForEvent(ctx, file.EventID))(t)
		if !shown.Encrypted || shown.Failure != "" || shown.Shield.Colour != "none" {
			t.Errorf("%s: Element shows the file as %+v", command, shown)
		}
	}
}

// masterKeyOf asks the homeserver for somebody's master key.
func masterKeyOf(t *testing.T, observer *people.Person, userID id.UserID) string {
	t.Helper()
	ctx := within(t, patience)
	keys := must(observer.Client.QueryKeys(ctx, &mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{userID: {}}}))(t)
	master, there := keys.MasterKeys[userID]
	if !there {
		t.Fatalf("%s has no master key", userID)
	}
	return master.FirstKey().String()
}

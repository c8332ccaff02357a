package e2e

import (
	"encoding/json"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/makiuchi-d/gozxing"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/element"
	"sendertrust/e2e/people"
)

// registry is a bot with an operator whose master key is pinned, and a person who uses Element.
type registry struct {
	bot      *botproc.Bot
	olga     *people.Person
	alice    *element.Client
	aliceKey id.Ed25519
	room     id.RoomID
	// firstSaid is what alice said before she was verified.
	firstSaid id.EventID
}

// newDesk makes a bot with operators, the first of which is olga, and a room with both.
func newDesk(t *testing.T, operators ...id.UserID) *registry {
	t.Helper()
	w := theWorld(t)
	r := new(registry)
	var olgaKey id.Ed25519
	r.olga, olgaKey = w.newStranger(t, "olga")
	r.bot = w.newBot(t, func(config botproc.Config) {
		pin(config, r.olga.UserID, olgaKey)
		config["trust"].(botproc.Config)["operators"] = append([]id.UserID{r.olga.UserID}, operators...)
	})
	r.room = newRoom(t, true, r.bot, r.olga)
	return r
}

// newRegistry has alice say something that the bot answers before anybody is verified.
func newRegistry(t *testing.T) *registry {
	t.Helper()
	r := newDesk(t)
	r.alice = theWorld(t).newElement(t, "alice")
	ctx := within(t, 2*patience)
	r.aliceKey = must(r.alice.BootstrapCrossSigning(ctx))(t)
	r.join(t, r.alice)
	r.firstSaid = must(r.alice.Send(ctx, r.room, say("hello")))(t)
	if answer := *must(r.olga.WaitForAnswer(ctx, r.firstSaid))(t); answer.Annotation.Code != "unverified_identity" {
		t.Fatalf("answered %s", answer.Annotation.Code)
	}
	return r
}

// join brings somebody into the room.
func (r *registry) join(t *testing.T, guest *element.Client) {
	t.Helper()
	ctx := within(t, 2*patience)
	ok(t, r.olga.Invite(ctx, r.room, guest.UserID()))
	ok(t, guest.Join(ctx, r.room))
	ok(t, guest.WaitForMember(ctx, r.room, r.bot.UserID))
	ok(t, r.olga.WaitJoined(ctx, r.room, guest.UserID()))
}

// notice waits until the bot has said something in the room.
func (r *registry) notice(t *testing.T, says ...string) people.Notice {
	t.Helper()
	var found people.Notice
	err := r.olga.WaitForNotices(within(t, patience), r.room, func(notices []people.Notice) bool {
		for _, notice := range notices {
			if contains(notice.Body, says...) {
				found = notice
				return true
			}
		}
		return false
	})
	if err != nil {
		t.Fatalf("%v: %q; said were %v", err, says, r.olga.Notices(r.room))
	}
	if !found.Encrypted || found.Sender != r.bot.UserID {
		t.Errorf("said by %s, encrypted: %v", found.Sender, found.Encrypted)
	}
	return found
}

// aCode finds what confirms a verification in the bot's words.
var aCode = regexp.MustCompile(`!trust confirm (\d{6})`)

// confirm is the command that confirms the verification with somebody, as the bot has shown it last.
func (r *registry) confirm(t *testing.T, userID id.UserID) string {
	t.Helper()
	command := ""
	err := r.olga.WaitForNotices(within(t, patience), r.room, func(notices []people.Notice) bool {
		for _, notice := range notices {
			if found := aCode.FindString(notice.Body); found != "" && contains(notice.Body, "pp of "+userID.String()) {
				command = found
			}
		}
		return command != ""
	})
	if err != nil {
		t.Fatalf("no code for %s: %v; said were %v", userID, err, r.olga.Notices(r.room))
	}
	return command
}

// saysTimes waits until the bot has said something that many times.
func (r *registry) saysTimes(t *testing.T, times int, says ...string) error {
	t.Helper()
	return r.olga.WaitForWords(within(t, patience), times, func(body string) bool { return contains(body, says...) })
}

// order has the operator give a command, and gives the answer.
func (r *registry) order(t *testing.T, command string, says ...string) people.Answer {
	t.Helper()
	ctx := within(t, patience)
	answer := *must(r.olga.WaitForAnswer(ctx, must(r.olga.Send(ctx, r.room, command))(t)))(t)
	if !contains(answer.Body, says...) {
		t.Errorf("%s was answered, without %q: %s", command, says, answer.Body)
	}
	return answer
}

// compare waits until both show emojis, and fails if they are not the same.
func (r *registry) compare(t *testing.T, verification id.VerificationTransactionID) element.Emojis {
	t.Helper()
	shown := must(r.alice.Emojis(within(t, patience), verification))(t)
	notice := r.notice(t, "Does the app of "+r.alice.UserID().String(), "!trust confirm ", r.olga.UserID.String())
	at := 0
	for _, name := range shown.Names {
		next := strings.Index(strings.ToLower(notice.Body[at:]), strings.ToLower(name))
		if next < 0 {
			t.Fatalf("Element shows %q, the bot says: %s", shown.Names, notice.Body)
		}
		at += next
	}
	var numbers []string
	for _, number := range shown.Numbers {
		numbers = append(numbers, strconv.Itoa(number))
	}
	if len(shown.Names) != 7 || len(numbers) != 3 || !strings.Contains(notice.Body, strings.Join(numbers, " ")) {
		t.Errorf("Element shows %q and %q, the bot says: %s", shown.Names, numbers, notice.Body)
	}
	return shown
}

// expectVerified looks at both sides after a verification: Element, the bot, and the answers of before.
func (r *registry) expectVerified(t *testing.T, verification id.VerificationTransactionID) {
	t.Helper()
	ctx := within(t, 2*patience)
	if ended := must(r.alice.WaitForPhase(ctx, verification, "done"))(t); ended.Phase != "done" {
		t.Errorf("Element says: %+v", ended)
	}
	r.expectStanding(t)
	corrected(t, r.olga, r.firstSaid, "verified")
	_, _, err := r.bot.Stop(ctx)
	ok(t, err)
	ok(t, r.bot.Restart(within(t, patience)))
	r.expectStanding(t)
}

// expectStanding looks whether Element and the bot hold each other for verified.
func (r *registry) expectStanding(t *testing.T) {
	t.Helper()
	ctx := within(t, 2*patience)
	ok(t, r.alice.WaitVerified(ctx, r.bot.UserID))
	eventID := must(r.alice.Send(ctx, r.room, say("it is me")))(t)
	answer := *must(r.olga.WaitForAnswer(ctx, eventID))(t)
	if answer.Annotation.Code != "verified" || answer.Annotation.MasterKey != r.aliceKey {
		t.Errorf("the bot says of alice's message: %+v", answer.Annotation)
	}
	reply := must(r.alice.WaitForReply(ctx, eventID))(t)
	if shields := must(r.alice.Shield(ctx, reply.EventID))(t); shields.Lax.Colour != "none" {
		t.Errorf("Element shows beside the bot's answer: %+v", shields)
	}
}

// expectUnverified looks at both sides after a verification that has failed.
func (r *registry) expectUnverified(t *testing.T, verification id.VerificationTransactionID, code event.VerificationCancelCode) {
	t.Helper()
	ctx := within(t, 2*patience)
	if ended := must(r.alice.WaitForPhase(ctx, verification, "cancelled"))(t); ended.Phase != "cancelled" || ended.CancelCode != code {
		t.Errorf("Element says: %+v", ended)
	}
	if verified, _, err := r.alice.VerificationStatus(ctx, r.bot.UserID); err != nil || verified {
		t.Errorf("Element shows the bot as verified: %v (%v)", verified, err)
	}
	eventID := must(r.alice.Send(ctx, r.room, say("still me")))(t)
	if answer := *must(r.olga.WaitForAnswer(ctx, eventID))(t); answer.Annotation.Code != "unverified_identity" {
		t.Errorf("the bot says of alice's message: %+v", answer.Annotation)
	}
	r.order(t, "!trust confirm "+r.alice.UserID().String(), "No verification with "+r.alice.UserID().String()+" is under way")
}

// request has alice ask the bot to verify, and waits until it takes part.
func (r *registry) request(t *testing.T) id.VerificationTransactionID {
	t.Helper()
	return r.requestAs(t, r.olga.UserID)
}

// requestAs is request with another operator.
func (r *registry) requestAs(t *testing.T, operator id.UserID) id.VerificationTransactionID {
	t.Helper()
	ctx := within(t, patience)
	verification := must(r.alice.RequestVerification(ctx, r.bot.UserID, r.room))(t)
	if accepted := must(r.alice.WaitForPhase(ctx, verification, "ready"))(t); accepted.Phase != "ready" {
		t.Fatalf("Element says: %+v", accepted)
	}
	r.notice(t, "are about to verify each other", operator.String())
	return verification
}

// askFor has the operator ask for a verification with alice, who accepts.
func (r *registry) askFor(t *testing.T) id.VerificationTransactionID {
	t.Helper()
	ctx := within(t, patience)
	r.order(t, "!trust verify "+r.alice.UserID().String(), "I have asked "+r.alice.UserID().String()+" to verify with me")
	asked := must(r.alice.WaitForVerification(ctx, r.bot.UserID))(t)
	ok(t, r.alice.AcceptVerification(ctx, asked.ID))
	return asked.ID
}

// botDevice is the bot's device.
func (r *registry) botDevice(t *testing.T) id.DeviceID {
	t.Helper()
	devices := must(r.olga.Devices(within(t, patience), r.bot.UserID))(t)
	if len(devices) != 1 {
		t.Fatalf("the bot has the devices %v", devices)
	}
	return devices[0].DeviceID
}

// scan reads the picture that the bot shows, as a camera does.
func (r *registry) scan(t *testing.T) []byte {
	t.Helper()
	ctx := within(t, patience)
	shown := must(r.alice.WaitForMessage(ctx, r.room, r.bot.UserID, event.MsgImage))(t)
	var content event.MessageEventContent
	ok(t, json.Unmarshal(shown.Content, &content))
	if !shown.Encrypted || content.File == nil || content.URL != "" {
		t.Fatalf("the picture is not encrypted: %s", shown.Content)
	}
	stored := must(r.olga.Client.DownloadBytes(ctx, must(content.File.URL.Parse())(t)))(t)
	return readQRCode(t, must(content.File.Decrypt(stored))(t))
}

// readQRCode gives the bytes in a picture, which have to be one segment.
func readQRCode(t *testing.T, picture []byte) []byte {
	t.Helper()
	segments, _ := readQR(t, picture).GetResultMetadata()[gozxing.ResultMetadataType_BYTE_SEGMENTS].([][]byte)
	if len(segments) != 1 {
		t.Fatalf("the code has %d segments of bytes", len(segments))
	}
	return segments[0]
}

func TestPersonVerifiesByEmojis(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	verification := r.request(t)
	r.order(t, "!trust confirm", "There is nothing to confirm yet")
	ok(t, r.alice.StartSAS(ctx, verification))
	r.compare(t, verification)
	ok(t, r.alice.ConfirmEmojis(ctx, verification))
	r.order(t, r.confirm(t, r.alice.UserID()), r.alice.UserID().String()+" is verified now", r.olga.UserID.String())
	r.expectVerified(t, verification)
	if slices.ContainsFunc(r.olga.Answers(id.EventID(verification)), func(people.Answer) bool { return true }) {
		t.Error("the request was answered like a message")
	}
}

func TestOperatorHasSomebodyVerifiedByEmojis(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	// An app that cannot scan: then the bot goes on by itself.
	ok(t, r.alice.SetVerificationMethods(ctx, event.VerificationMethodSAS))
	verification := r.askFor(t)
	r.compare(t, verification)
	confirm := r.confirm(t, r.alice.UserID())
	r.order(t, "!trust confirm", "Please add the code that I have shown")
	r.order(t, confirm, "Now "+r.alice.UserID().String()+" has to confirm, too")
	r.order(t, confirm, "An operator has confirmed this verification already")
	ok(t, r.alice.ConfirmEmojis(ctx, verification))
	r.notice(t, r.alice.UserID().String()+" is verified now", r.olga.UserID.String())
	r.expectVerified(t, verification)
}

func TestPersonVerifiesByQRCode(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	verification := r.request(t)
	ok(t, r.alice.ScanQRCode(ctx, verification, r.scan(t)))
	r.notice(t, "says that it has scanned my code", "!trust confirm ")
	if verified, _, err := r.alice.VerificationStatus(ctx, r.bot.UserID); err != nil || verified {
		t.Errorf("Element shows the bot as verified before an operator has confirmed: %v (%v)", verified, err)
	}
	r.order(t, r.confirm(t, r.alice.UserID()), r.alice.UserID().String()+" is verified now")
	r.expectVerified(t, verification)
}

func TestOperatorHasSomebodyVerifiedByQRCode(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	verification := r.askFor(t)
	ok(t, r.alice.ScanQRCode(ctx, verification, r.scan(t)))
	r.notice(t, "says that it has scanned my code")
	r.order(t, r.confirm(t, r.alice.UserID()), r.alice.UserID().String()+" is verified now")
	r.expectVerified(t, verification)
}

func TestVerificationBetweenDevices(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	verification := must(r.alice.RequestDeviceVerification(ctx, r.bot.UserID, r.botDevice(t)))(t)
	if accepted := must(r.alice.WaitForPhase(ctx, verification, "ready"))(t); accepted.Phase != "ready" {
		t.Fatalf("Element says: %+v", accepted)
	}
	ok(t, r.alice.StartSAS(ctx, verification))
	r.compare(t, verification)
	ok(t, r.alice.ConfirmEmojis(ctx, verification))
	r.order(t, r.confirm(t, r.alice.UserID()), r.alice.UserID().String()+" is verified now")
	r.expectVerified(t, verification)
}

func TestOperatorDeniesWhatTheAppShows(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	verification := r.request(t)
	ok(t, r.alice.StartSAS(ctx, verification))
	r.compare(t, verification)
	ok(t, r.alice.ConfirmEmojis(ctx, verification))
	r.order(t, "!trust deny "+r.alice.UserID().String(), "has failed: what the app shows is something else", "sits between")
	r.expectUnverified(t, verification, event.VerificationCancelCodeSASMismatch)
}

func TestPersonSaysThatTheEmojisDiffer(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	verification := r.request(t)
	ok(t, r.alice.StartSAS(ctx, verification))
	r.compare(t, verification)
	ok(t, r.alice.DenyEmojis(ctx, verification))
	r.notice(t, "has failed: the app says that it does not match", "sits between")
	r.expectUnverified(t, verification, event.VerificationCancelCodeSASMismatch)
}

func TestPersonCancels(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	verification := r.request(t)
	ok(t, r.alice.CancelVerification(ctx, verification))
	r.notice(t, r.alice.UserID().String()+" has cancelled the verification")
	r.expectUnverified(t, verification, event.VerificationCancelCodeUser)
	asked := r.askFor(t)
	ok(t, r.alice.CancelVerification(ctx, asked))
	r.expectUnverified(t, asked, event.VerificationCancelCodeUser)
}

func TestVerificationEndsWithTheProcess(t *testing.T) {
	t.Parallel()
	r := newRegistry(t)
	ctx := within(t, 3*patience)
	verification := r.request(t)
	ok(t, r.alice.StartSAS(ctx, verification))
	r.compare(t, verification)
	r.bot.Kill()
	ok(t, r.bot.Restart(ctx))
	r.notice(t, "has ended: I was started anew")
	r.expectUnverified(t, verification, event.VerificationCancelCodeUser)
}

package element

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/synapse"
)

const (
	projectRoot = "../.."
	password    = "correct horse battery staple"
	patience    = 3 * time.Minute
)

// scene is a homeserver of the test's own.
type scene struct {
	t      *testing.T
	ctx    context.Context
	server *synapse.Server
}

func newScene(t *testing.T) *scene {
	t.Helper()
	if testing.Short() {
		t.Skip("runs a homeserver and Element's crypto")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	server, err := synapse.Start(ctx, synapse.Options{ProjectRoot: projectRoot})
	must(t, err)
	t.Cleanup(func() { must(t, server.Stop()) })
	return &scene{t, ctx, server}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// person registers somebody and logs in.
func (s *scene) person(name string) *Client {
	s.t.Helper()
	must(s.t, s.server.Register(s.ctx, name, password))
	return s.device(name)
}

// device logs in once more.
func (s *scene) device(name string) *Client {
	s.t.Helper()
	begin := time.Now()
	client, err := Start(s.ctx, projectRoot, s.server.URL, name, password)
	must(s.t, err)
	s.t.Logf("%s is %s, %s after %s", name, client.UserID(), client.DeviceID(), time.Since(begin).Round(time.Millisecond))
	s.t.Cleanup(func() { must(s.t, client.Close()) })
	return client
}

func (s *scene) crossSigned(name string) (*Client, id.Ed25519) {
	s.t.Helper()
	client := s.person(name)
	masterKey, err := client.BootstrapCrossSigning(s.ctx)
	must(s.t, err)
	return client, masterKey
}

// encryptedRoom is a room of two.
func (s *scene) encryptedRoom(creator, guest *Client) id.RoomID {
	s.t.Helper()
	room, err := creator.CreateRoom(s.ctx, Room{Encrypted: true, Invite: []id.UserID{guest.UserID()}, Name: "A room"})
	must(s.t, err)
	must(s.t, guest.Join(s.ctx, room))
	must(s.t, creator.WaitForMember(s.ctx, room, guest.UserID()))
	return room
}

// send sends a text in a session of its own, since shields are fixed for each session, and waits until it is read.
func (s *scene) send(from, to *Client, room id.RoomID, body string) *Event {
	s.t.Helper()
	must(s.t, from.ForceDiscardSession(s.ctx, room))
	eventID, err := from.Send(s.ctx, room, body)
	must(s.t, err)
	received, err := to.WaitForEvent(s.ctx, eventID)
	must(s.t, err)
	var content event.MessageEventContent
	must(s.t, json.Unmarshal(received.Content, &content))
	if received.Sender != from.UserID() || received.RoomID != room || received.Type != "m.room.message" || content.Body != body {
		s.t.Fatalf("%s received: %+v", to.UserID(), received)
	}
	return received
}

func (s *scene) expectShields(at *Client, eventID id.EventID, lax, strict Shield) {
	s.t.Helper()
	shields, err := at.Shield(s.ctx, eventID)
	must(s.t, err)
	if shields != (Shields{Lax: lax, Strict: strict}) {
		s.t.Errorf("the shields are %+v; should be %+v and %+v", shields, lax, strict)
	}
}

var (
	none      = Shield{Colour: "none"}
	unsigned  = Shield{Colour: "red", Reason: "unsigned_device"}
	violation = Shield{Colour: "red", Reason: "verification_violation"}
	// unverified is also the strict shield of what the other two say.
	unverified = Shield{Colour: "red", Reason: "unverified_identity"}
)

func TestMessagesOfCrossSignedUsersAreDecryptedAndHaveShields(t *testing.T) {
	s := newScene(t)
	alice, aliceKey := s.crossSigned("alice")
	bob, bobKey := s.crossSigned("bob")
	room := s.encryptedRoom(alice, bob)

	received := s.send(alice, bob, room, "hello")
	if !received.Encrypted || received.Failure != "" || received.Shield != none {
		t.Errorf("bob received: %+v", received)
	}
	s.expectShields(bob, received.EventID, none, unverified)
	if received = s.send(bob, alice, room, "hello yourself"); !received.Encrypted {
		t.Errorf("alice received: %+v", received)
	}

	verified, err := bob.VerifyUser(s.ctx, alice.UserID())
	must(t, err)
	asked, err := alice.MasterKey(s.ctx, bob.UserID())
	must(t, err)
	if verified != aliceKey || asked != bobKey || len(aliceKey) != 43 || aliceKey == bobKey {
		t.Errorf("the master keys are %s and %s; the others see %s and %s", aliceKey, bobKey, verified, asked)
	}
	received = s.send(alice, bob, room, "am I me?")
	s.expectShields(bob, received.EventID, none, none)

	newKey, err := alice.ResetIdentity(s.ctx)
	must(t, err)
	if seen, err := bob.MasterKey(s.ctx, alice.UserID()); err != nil || seen != newKey || newKey == aliceKey {
		t.Errorf("the new master key is %s, seen as %s: %v", newKey, seen, err)
	}
	received = s.send(alice, bob, room, "am I me still?")
	s.expectShields(bob, received.EventID, violation, unverified)
}

func TestMessagesOfDevicesThatNobodySignedHaveRedShields(t *testing.T) {
	s := newScene(t)
	alice, bob := s.person("alice"), s.person("bob")
	received := s.send(alice, bob, s.encryptedRoom(alice, bob), "hello")
	s.expectShields(bob, received.EventID, unsigned, unverified)
}

func TestKeysAreWithheldFromUnverifiedDevices(t *testing.T) {
	s := newScene(t)
	alice, _ := s.crossSigned("alice")
	bob, _ := s.crossSigned("bob")
	room := s.encryptedRoom(alice, bob)
	must(t, alice.SetBlacklistUnverified(s.ctx, true))
	eventID, err := alice.Send(s.ctx, room, "not for bob")
	must(t, err)
	failed, err := bob.WaitForUndecryptable(s.ctx, eventID)
	must(t, err)
	const withheld = "MEGOLM_KEY_WITHHELD_FOR_UNVERIFIED_DEVICE"
	if failed.Failure != withheld || !failed.Encrypted || failed.Shield != (Shield{}) {
		t.Errorf("bob has: %+v", failed)
	}
	ctx, cancel := context.WithTimeout(s.ctx, time.Second)
	defer cancel()
	if _, err = bob.WaitForEvent(ctx, eventID); err == nil || !strings.Contains(err.Error(), withheld) {
		t.Errorf("waiting for what never can be read: %v", err)
	}
	must(t, alice.SetBlacklistUnverified(s.ctx, false))
	s.send(alice, bob, room, "for bob, too")
}

func TestReplyIsFoundByItsAnnotation(t *testing.T) {
	s := newScene(t)
	alice, bob := s.person("alice"), s.person("bob")
	room := s.encryptedRoom(alice, bob)
	question, err := alice.Send(s.ctx, room, "who am I?")
	must(t, err)
	inThread, err := alice.SendInThread(s.ctx, room, question, "really?")
	must(t, err)
	received, err := bob.WaitForEvent(s.ctx, inThread)
	must(t, err)
	var content event.MessageEventContent
	must(t, json.Unmarshal(received.Content, &content))
	if content.RelatesTo.GetThreadParent() != question {
		t.Errorf("bob received: %s", received.Content)
	}

	type found struct {
		reply *Event
		err   error
	}
	replies := make(chan found, 1)
	go func() {
		reply, err := alice.WaitForReply(s.ctx, inThread)
		replies <- found{reply, err}
	}()
	for _, answered := range []id.EventID{question, inThread} {
		_, err = bob.SendRaw(s.ctx, room, event.EventMessage, map[string]any{
			"msgtype": "m.notice", "body": "about " + answered,
			"dev.sendertrust.annotation": map[string]any{"event_id": answered},
		})
		must(t, err)
	}
	got := <-replies
	must(t, got.err)
	must(t, json.Unmarshal(got.reply.Content, &content))
	if content.Body != "about "+inThread.String() || !got.reply.Encrypted || got.reply.Sender != bob.UserID() || got.reply.Shield != unsigned {
		t.Errorf("alice got: %+v", got.reply)
	}

	events, err := alice.Events(s.ctx, room)
	must(t, err)
	var bodies []string
	for _, seen := range events {
		must(t, json.Unmarshal(seen.Content, &content))
		if seen.Type == "m.room.message" {
			bodies = append(bodies, content.Body)
		}
	}
	expected := fmt.Sprintf("[who am I? really? about %s about %s]", question, inThread)
	if fmt.Sprint(bodies) != expected {
		t.Errorf("alice has seen %v; should be %s", bodies, expected)
	}
}

func TestRoomWithoutEncryptionHasEventsWithoutShield(t *testing.T) {
	s := newScene(t)
	alice := s.person("alice")
	room, err := alice.CreateRoom(s.ctx, Room{Name: "In the clear"})
	must(t, err)
	sent, err := alice.Send(s.ctx, room, "hello")
	must(t, err)
	received, err := alice.WaitForEvent(s.ctx, sent)
	must(t, err)
	if received.Encrypted || received.Shield != (Shield{}) {
		t.Errorf("alice has: %+v", received)
	}
}

func TestLogoutDeletesTheDeviceAndEndsTheProcess(t *testing.T) {
	s := newScene(t)
	alice := s.person("alice")
	second := s.device("alice")
	if second.DeviceID() == alice.DeviceID() {
		t.Fatal("two logins are the same device")
	}
	must(t, second.Logout(s.ctx))
	if err := second.ForceDiscardSession(s.ctx, "!room:localhost"); !errors.Is(err, ErrClosed) {
		t.Errorf("a call after the logout: %v", err)
	}
	if _, err := os.Stat(filepath.Join("/proc", strconv.Itoa(second.PID()))); !os.IsNotExist(err) {
		t.Errorf("process %d is still there: %v", second.PID(), err)
	}
	request, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.server.URL+"/_matrix/client/v3/devices", nil)
	must(t, err)
	request.Header.Set("Authorization", "Bearer "+alice.AccessToken())
	answer, err := http.DefaultClient.Do(request)
	must(t, err)
	defer answer.Body.Close()
	devices, err := io.ReadAll(answer.Body)
	must(t, err)
	if !strings.Contains(string(devices), alice.DeviceID().String()) || strings.Contains(string(devices), second.DeviceID().String()) {
		t.Errorf("alice's devices are %s", devices)
	}
}

func TestWrongPasswordIsAnErrorThatSaysSo(t *testing.T) {
	s := newScene(t)
	must(t, s.server.Register(s.ctx, "alice", password))
	_, err := Start(s.ctx, projectRoot, s.server.URL, "alice", "another")
	if err == nil || !strings.Contains(err.Error(), "Invalid username or password") {
		t.Errorf("the error is: %v", err)
	}
}

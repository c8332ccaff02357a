package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// expectStillAnswering makes sure that the bot gives an honest member the right verdict after others have sent it junk, and that
// it has not started anew meanwhile.
func expectStillAnswering(t *testing.T, bot *botproc.Bot, honest *people.Person, masterKey id.Ed25519, room id.RoomID) {
	t.Helper()
	honest.RotateSession(room)
	eventID := must(honest.Send(within(t, patience), room, say("still there?")))(t)
	expect(t, bot, honest, eventID, unverifiedIdentity(honest, masterKey, sessionID(t, honest, room)))
	if starts := bot.LogMentioning(botproc.ReadyMessage); len(starts) != 1 {
		t.Errorf("the bot has started %d times", len(starts))
	}
	if panics := bot.LogMentioning("panic"); len(panics) > 0 {
		t.Errorf("the bot panicked: %s", panics[0])
	}
}

func TestJunkInRoomEventsIsSurvived(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newBot(t, nil)
	alice, masterKey := w.newStranger(t, "alice")
	mallory, _ := w.newStranger(t, "mallory")
	room := newRoom(t, true, bot, alice, mallory)
	ctx := within(t, 5*patience)
	session := must(mallory.NewSession(room))(t)
	ok(t, mallory.ShareKey(ctx, session, bot.UserID))
	valid := must(mallory.Encrypt(session, "m.room.message", map[string]any{
		"msgtype": "m.text", "body": say("junk"), "m.relates_to": map[string]any{"m.in_reply_to": map[string]any{"event_id": "$nothing"}},
	}))(t)
	// Whatever is wrong with a message, members may see it, so it is to be answered. What is encrypted need not be a message.
	messages, others := make(map[id.EventID]string), make(map[id.EventID]string)
	for _, bad := range must(people.JunkIn(valid))(t) {
		messages[must(mallory.SendRaw(ctx, room, event.EventEncrypted.Type, bad.Content))(t)] = bad.Name
	}
	for i, payload := range junkPayloads(t, room) {
		encrypted := must(mallory.EncryptBytes(session, payload))(t)
		others[must(mallory.SendRaw(ctx, room, event.EventEncrypted.Type, encrypted))(t)] = fmt.Sprint("payload ", i)
	}
	clear := map[string]any{"msgtype": "m.text", "body": say("junk"), "format": "x", "formatted_body": "y", "m.mentions": map[string]any{"user_ids": []any{}}}
	for _, bad := range must(people.JunkIn(clear))(t) {
		eventID, err := mallory.SendRaw(ctx, room, event.EventMessage.Type, bad.Content)
		if _, refused := errors.AsType[mautrix.HTTPError](err); refused {
			continue // the homeserver itself looks at some fields
		}
		ok(t, err)
		messages[eventID] = "in the clear, " + bad.Name
	}
	expectStillAnswering(t, bot, alice, masterKey, room)
	waited := within(t, 2*keyWait)
	for eventID, name := range messages {
		if _, err := alice.WaitForAnswer(waited, eventID); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		others[eventID] = name
	}
	settle(t, alice, room)
	for eventID, name := range others {
		if answers := alice.Answers(eventID); len(answers) > 1 {
			t.Errorf("%s: %d answers", name, len(answers))
		}
	}
}

// junkPayloads are things that a member can encrypt instead of an event.
func junkPayloads(t *testing.T, room id.RoomID) (payloads [][]byte) {
	event := map[string]any{"type": "m.room.message", "room_id": room, "content": map[string]any{"msgtype": "m.text", "body": say("junk")}}
	for _, bad := range must(people.JunkIn(event))(t) {
		payloads = append(payloads, must(json.Marshal(bad.Content))(t))
	}
	return append(payloads, []byte(" "), []byte("\xff\xfe\x00"), []byte("{"), []byte("[]"), []byte("null"),
		[]byte(`{"type":"m.room.message","content":{"body":"`+"\xff\xc0"+`"}}`), []byte(strings.Repeat(`{"content":`, 3000)))
}

func TestJunkInToDeviceEventsIsSurvived(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newBot(t, nil)
	alice, masterKey := w.newStranger(t, "alice")
	mallory, _ := w.newStranger(t, "mallory")
	room := newRoom(t, true, bot, alice, mallory)
	ctx := within(t, 2*patience)
	devices := must(mallory.Devices(ctx, bot.UserID))(t)
	if len(devices) != 1 {
		t.Fatalf("the bot has the devices %v", devices)
	}
	device := devices[0]
	session := must(mallory.NewSession(room))(t)
	roomKey := map[string]any{"algorithm": id.AlgorithmMegolmV1, "room_id": room, "session_id": session.ID, "session_key": session.Key}
	payload := must(mallory.OlmPayload(device, event.ToDeviceRoomKey.Type, roomKey))(t)

	// Junk under the encryption: in every field of an Olm message.
	for _, bad := range must(people.JunkIn(payload))(t) {
		sendOlmBytes(t, ctx, mallory, device, must(json.Marshal(bad.Content))(t))
	}
	for _, plaintext := range []string{" ", "\xff\xfe\x00", "{", "[]", "null", `{"type":"m.room_key","content":"` + "\xff" + `"}`, strings.Repeat(`{"content":`, 3000)} {
		sendOlmBytes(t, ctx, mallory, device, []byte(plaintext))
	}
	// Junk in place of the encryption, and in the events that are sent in the clear.
	encrypted := must(mallory.EncryptOlm(ctx, device, must(json.Marshal(payload))(t)))(t)
	sendJunk(t, ctx, mallory, device, event.ToDeviceEncrypted.Type, encrypted)
	sendJunk(t, ctx, mallory, device, event.ToDeviceRoomKeyWithheld.Type, map[string]any{
		"algorithm": id.AlgorithmMegolmV1, "room_id": room, "session_id": session.ID, "sender_key": mallory.SenderKey(), "code": "m.unverified", "reason": "none",
	})
	sendJunk(t, ctx, mallory, device, event.ToDeviceRoomKeyRequest.Type, map[string]any{
		"action": "request", "requesting_device_id": mallory.DeviceID, "request_id": "1",
		"body": map[string]any{"algorithm": id.AlgorithmMegolmV1, "room_id": room, "session_id": session.ID, "sender_key": mallory.SenderKey()},
	})
	// Things that may come only encrypted, sent in the clear, and types that nobody knows.
	bare := must(mallory.NewSession(room))(t)
	bareKey := map[string]any{"algorithm": id.AlgorithmMegolmV1, "room_id": room, "session_id": bare.ID, "session_key": bare.Key}
	for _, eventType := range []string{event.ToDeviceRoomKey.Type, event.ToDeviceForwardedRoomKey.Type, event.ToDeviceSecretSend.Type, event.ToDeviceDummy.Type, "x", " "} {
		ok(t, mallory.SendToDevice(ctx, eventType, bot.UserID, device.DeviceID, bareKey))
	}
	unreadable := must(mallory.SendWith(ctx, bare, say("with a key that was sent in the clear")))(t)
	expectStillAnswering(t, bot, alice, masterKey, room)
	expectUnreadable(t, bot, alice, unreadable, bare.ID, "key has not come")
}

func sendOlmBytes(t *testing.T, ctx context.Context, sender *people.Person, device *people.Device, plaintext []byte) {
	t.Helper()
	content := must(sender.EncryptOlm(ctx, device, plaintext))(t)
	ok(t, sender.SendToDevice(ctx, event.ToDeviceEncrypted.Type, device.UserID, device.DeviceID, content))
}

func sendJunk(t *testing.T, ctx context.Context, sender *people.Person, device *people.Device, eventType string, valid map[string]any) {
	t.Helper()
	for _, bad := range must(people.JunkIn(valid))(t) {
		ok(t, sender.SendToDevice(ctx, eventType, device.UserID, device.DeviceID, bad.Content))
	}
}

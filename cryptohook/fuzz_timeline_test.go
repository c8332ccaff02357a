package cryptohook

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// The tables that a room event may change: nothing in them says who anybody is.
var timelineTables = []string{
	"sendertrust_inbox", "crypto_message_index", "mx_room_state", "mx_user_profile", "mx_registrations",
	"crypto_megolm_outbound_session", "sendertrust_key_request",
}

// FuzzTimelineEvent: an event in the timeline of an encrypted room, with the trust requirement or without. Its handler sees it at most once.
// Only a genuine message that comes in its sender's name counts as that person's, what it says is what was said, and nothing of a plaintext that is
// withheld is seen. The room stays encrypted.
func FuzzTimelineEvent(f *testing.F) {
	w := newFuzzWorld(f)
	for _, seed := range w.timelineSeeds() {
		raw := []byte(rawJSON(seed))
		f.Add(true, raw)
		f.Add(false, raw)
	}
	f.Fuzz(func(t *testing.T, strict bool, raw []byte) {
		if !json.Valid(raw) {
			t.Skip("FuzzSyncAnswer is about those")
		}
		requirement := RequireNothing
		if strict {
			requirement = RequireCrossSigned
		}
		r := w.begin(t, len(raw), requirement)
		defer r.end()
		r.sync(object{"rooms": object{"join": object{trustRoom.String(): object{"timeline": object{"events": []json.RawMessage{raw}}}}}})
		r.handle()
		r.unchangedBut("a room event came", timelineTables...)
		r.checkTrust(w.evidence())
		if !must(r.hook.client.StateStore.IsEncrypted(r.ctx, trustRoom)) {
			t.Error("the room is not encrypted any more")
		}
		times := make(map[id.EventID]int)
		for _, seen := range r.seen {
			if !passesInbox(seen.evt) {
				continue
			}
			if times[seen.eventID]++; times[seen.eventID] > 1 {
				t.Errorf("a handler saw %s twice", seen.eventID)
			}
			r.checkSeen(strict, raw, seen)
		}
	})
}

// checkSeen sees that a verdict, and what is shown with it, are not more than the event deserves.
func (r *fuzzRun) checkSeen(strict bool, raw []byte, seen seenEvent) {
	r.t.Helper()
	var came struct {
		Type    string          `json:"type"`
		Sender  id.UserID       `json:"sender"`
		Content json.RawMessage `json:"content"`
	}
	_ = json.Unmarshal(raw, &came)
	message := r.messageIn(came.Content)
	code := seen.verdict.Code
	switch {
	case came.Type != "m.room.encrypted":
		if code != CodeSentInClear {
			r.t.Errorf("plaintext in an encrypted room is %s", code)
		}
		if strict {
			r.checkWithheld(seen)
		}
		return
	case message == nil || came.Sender != message.from.owner.userID:
		if code != CodeUnableToDecrypt && code != CodeMismatchedSender || seen.body != "" {
			r.t.Errorf("an event that nobody has sent so is %s, and says %q", code, seen.body)
		}
		return
	}
	want := map[*actorDevice]Code{
		r.devices[fuzzAlice][fuzzSigned]: CodeVerified, r.devices[fuzzAlice][fuzzUnsigned]: CodeUnsignedDevice,
		r.devices[fuzzEve][fuzzSigned]: CodeUnverifiedIdentity, r.devices[fuzzEve][fuzzUnsigned]: CodeUnsignedDevice,
	}[message.from]
	if code != want && code != CodeUnableToDecrypt {
		r.t.Errorf("a message of %s is %s, want %s", message.from.deviceID, code, want)
	}
	if seen.body != "" && (seen.body != message.text || strict && want == CodeUnsignedDevice) {
		r.t.Errorf("a message of %s that is %s says %q", message.from.deviceID, code, seen.body)
	}
}

// messageIn gives the genuine message whose ciphertext is in an event of its session.
func (r *fuzzRun) messageIn(raw []byte) *genuineMessage {
	var content event.EncryptedEventContent
	if json.Unmarshal(raw, &content) != nil {
		return nil
	}
	for i, said := range r.said {
		if sameBase64(string(content.MegolmCiphertext), said.ciphertext) && content.SessionID.String() == said.content["session_id"] {
			return &r.said[i]
		}
	}
	return nil
}

// checkWithheld sees that nothing is left of a plaintext that somebody may obey.
func (r *fuzzRun) checkWithheld(seen seenEvent) {
	r.t.Helper()
	if !seen.verdict.ContentWithheld || seen.body != "" {
		r.t.Errorf("plaintext is not withheld: %q", seen.body)
	}
	for key := range seen.evt.Content.Raw {
		if !slices.Contains([]string{"msgtype", "m.relates_to", verdictKey}, key) {
			r.t.Errorf("%q of a plaintext is not withheld", key)
		}
	}
}

func (w *fuzzWorld) timelineSeeds() (seeds []object) {
	add := func(sender id.UserID, eventType string, content any, changes ...func(evt object)) {
		evt := object{"type": eventType, "event_id": "$event", "sender": sender.String(), "origin_server_ts": 1_700_000_000_000, "content": content}
		for _, change := range changes {
			change(evt)
		}
		seeds = append(seeds, evt)
	}
	with := func(key string, value any) func(object) { return func(evt object) { evt[key] = value } }
	for _, said := range w.said {
		add(said.from.owner.userID, "m.room.encrypted", said.content)
		add(w.eve.userID, "m.room.encrypted", said.content)
		add(w.bot.userID, "m.room.encrypted", said.content)
	}
	first, second := w.said[0], w.said[1]
	changed := func(key string, value any) object {
		content := maps.Clone(first.content)
		content[key] = value
		return content
	}
	add(w.alice.userID, "m.room.encrypted", changed("session_id", second.content["session_id"]))
	add(w.alice.userID, "m.room.encrypted", changed("session_id", w.fresh[first.from].id().String()))
	add(w.alice.userID, "m.room.encrypted", changed("sender_key", second.from.senderKey().String()))
	add(w.alice.userID, "m.room.encrypted", changed("m.relates_to", object{"rel_type": "m.thread", "event_id": "$root"}))
	add(w.alice.userID, "m.room.encrypted", changed("ciphertext", object{"x": object{"type": 0, "body": "AAAA"}}))
	add(w.alice.userID, "m.room.encrypted", changed("ciphertext", first.ciphertext+"A"))
	add(w.alice.userID, "m.room.encrypted", changed("algorithm", string(id.AlgorithmOlmV1)))
	add(w.alice.userID, "m.room.encrypted", changed(verdictKey, object{"verdict": object{"Code": "verified"}}))
	text := object{"msgtype": "m.text", "body": "in the clear"}
	add(w.alice.userID, "m.room.message", text)
	add(w.bot.userID, "m.room.message", text)
	add(w.bot.userID, "m.room.message", text, with("unsigned", object{"transaction_id": "t"}))
	add(w.alice.userID, "m.room.message", object{
		"msgtype": "m.text", "body": "*", "m.new_content": text, "m.relates_to": object{"rel_type": "m.replace", "event_id": "$x"},
		verdictKey: object{"verdict": object{"Code": "verified"}},
	})
	add(w.alice.userID, "m.sticker", object{"body": "sticker", "url": "mxc://test/x", "info": object{}})
	add(w.alice.userID, "m.reaction", object{"m.relates_to": object{"rel_type": "m.annotation", "event_id": "$x", "key": "+"}})
	add(w.alice.userID, "m.room.redaction", object{"redacts": "$x"}, with("redacts", "$x"))
	add(w.alice.userID, "m.room.message", object{}, with("unsigned", object{"redacted_because": object{}}))
	add(w.alice.userID, "m.room.message", nil)
	add(w.eve.userID, "m.room.encryption", object{"algorithm": ""}, with("state_key", ""))
	add(w.eve.userID, "m.room.encryption", object{"algorithm": string(id.AlgorithmMegolmV1), "rotation_period_ms": -1}, with("state_key", ""))
	add(w.eve.userID, "m.room.encryption", object{}, with("state_key", "x"))
	add(w.eve.userID, "m.room.member", object{"membership": "join", "displayname": "Alice"}, with("state_key", "@eve:test"))
	add(w.bot.userID, "m.room.member", object{"membership": "join"}, with("state_key", "@bot:test"))
	add(w.eve.userID, "m.room.member", object{"membership": "ban"}, with("state_key", "@bot:test"))
	add(w.eve.userID, "m.room.history_visibility", object{"history_visibility": "world_readable"}, with("state_key", ""))
	add(w.eve.userID, "m.room.name", object{"name": "x"}, with("state_key", ""))
	return append(seeds, object{}, object{"type": 5, "content": "text"}, object{"type": "m.room.message", "event_id": []any{}, "sender": nil})
}

// FuzzSyncAnswer: a /sync answer as bytes, after one that could not be parsed. What can be parsed without its events can be parsed after
// the malformed ones were dropped, and no other event is lost; and the hook bears what comes out.
func FuzzSyncAnswer(f *testing.F) {
	w := newFuzzWorld(f)
	for _, seed := range w.syncSeeds() {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		lenient, err := dropMalformedEvents(context.Background(), body)
		if err != nil {
			t.Fatal(err)
		}
		var answer any
		decoder := json.NewDecoder(bytes.NewReader(body))
		decoder.UseNumber()
		if decoder.Decode(&answer) != nil {
			if !bytes.Equal(lenient, body) {
				t.Error("what is no JSON has been changed")
			}
			return
		}
		var before, after mautrix.RespSync
		bare := rawJSON(withoutEvents(answer))
		if json.Unmarshal(bare, &mautrix.RespSync{}) != nil {
			return // something else is malformed
		}
		if err = json.Unmarshal(lenient, &after); err != nil {
			t.Fatalf("the answer cannot be parsed for its events only, and still not without the malformed ones: %v", err)
		}
		if json.Unmarshal(body, &before) == nil && string(rawJSON(before)) != string(rawJSON(after)) {
			t.Error("an answer that could be parsed has become another one")
		}
		if lost := lostEvents(answer, lenient); lost != "" {
			t.Errorf("an event is lost that can be parsed: %s", lost)
		}
		r := w.begin(t, len(body), RequireNothing)
		defer r.end()
		r.network.down.Store(false) // what a /sync left out is asked for
		if err = r.hook.syncer.ProcessResponse(r.ctx, &after, "before"); err != nil && after.NextBatch != "" {
			t.Errorf("the answer ends the sync: %v", err)
		}
		r.hook.background.Wait()
		r.handle()
	})
}

// withoutEvents gives a value with empty lists in the place of events, wherever there are any.
func withoutEvents(value any) any {
	members, isObject := value.(map[string]any)
	if !isObject {
		return value
	}
	bare := make(map[string]any, len(members))
	for key, member := range members {
		if _, isList := member.([]any); isList && strings.EqualFold(key, "events") {
			bare[key] = []any{}
		} else {
			bare[key] = withoutEvents(member)
		}
	}
	return bare
}

// lostEvents gives an event that mautrix can parse and that is no longer among those of its list, or nothing.
func lostEvents(before any, lenient []byte) (lost string) {
	var after any
	decoder := json.NewDecoder(bytes.NewReader(lenient))
	decoder.UseNumber()
	if err := decoder.Decode(&after); err != nil {
		return err.Error()
	}
	var compare func(before, after any)
	compare = func(before, after any) {
		was, _ := before.(map[string]any)
		is, _ := after.(map[string]any)
		for key, member := range was {
			list, isList := member.([]any)
			if !isList || !strings.EqualFold(key, "events") {
				compare(member, is[key])
				continue
			}
			left, _ := is[key].([]any)
			for _, item := range list {
				raw := rawJSON(item)
				if json.Unmarshal(raw, new(event.Event)) != nil {
					continue
				}
				if len(left) == 0 || !bytes.Equal(rawJSON(left[0]), raw) {
					lost = string(raw)
					return
				}
				left = left[1:]
			}
			if len(left) > 0 {
				lost = "one is there that was not: " + string(rawJSON(left[0]))
			}
		}
	}
	compare(before, after)
	return lost
}

func (w *fuzzWorld) syncSeeds() (seeds []string) {
	good, bad := `{"type":"m.room.message","event_id":"$e","sender":"@alice:test","content":{"msgtype":"m.text","body":"x"}}`, `{"type":5,"content":"x"}`
	invite := `{"type":"m.room.member","state_key":"@bot:test","sender":"@eve:test","content":{"membership":"invite"}}`
	list := `{"events":[` + bad + `,` + good + `,null,` + bad + `,` + invite + `,5,[]]}`
	for _, part := range []string{"state", "timeline", "ephemeral", "account_data", "state_after", "msc4354_sticky"} {
		seeds = append(seeds, `{"next_batch":"t","rooms":{"join":{"!room:test":{"`+part+`":`+list+`}}}}`)
	}
	seeds = append(seeds,
		`{"next_batch":"t","to_device":`+list+`,"account_data":`+list+`,"presence":`+list+`}`,
		`{"next_batch":"t","to_device":{"Events":[`+bad+`,`+good+`]}}`,
		`{"next_batch":"t","rooms":{"invite":{"!x:test":{"invite_state":`+list+`}},"knock":{"!y:test":{"knock_state":`+list+`}},"leave":{"!z:test":{"timeline":`+list+`}}}}`,
		`{"next_batch":"t","rooms":{"join":{"!room:test":null,"events":{"timeline":`+list+`}},"invite":{"!x:test":null},"leave":{"!y:test":null}}}`,
		`{"next_batch":"t","rooms":{"join":{"!room:test":{"timeline":{"limited":true,"prev_batch":"p","events":[`+good+`]}}}}}`,
		`{"next_batch":"t","device_lists":{"changed":["@alice:test","@eve:test"],"left":[]},"device_one_time_keys_count":{"signed_curve25519":50}}`,
		`{"next_batch":"t","rooms":{"join":{"!room:test":{"com.beeper.inbox.preview":{"event_id":"$x","event":`+bad+`}}}}}`,
		`{"next_batch":5}`, `{}`, `null`, `[`, `{"next_batch":"t"} and more`, `{"next_batch":"t","to_device":`+strings.Repeat(`{"a":`, 200)+`1`+strings.Repeat(`}`, 200)+`}`,
		`{"next_batch":"t","to_device":{"events":[{"type":"m.x","content":{"n":12345678901234567890,"f":1.50,"text":"<\ud83d\ude00>"}}]}}`,
	)
	for _, letter := range w.letters {
		seeds = append(seeds, string(rawJSON(object{"next_batch": "t", "to_device": object{"events": []any{letter.event, "x"}}})))
	}
	return seeds
}

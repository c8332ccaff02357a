package cryptohook

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// The tables that a room key that is taken may change, and those of every Olm message that can be decrypted.
var (
	olmTables = []string{"crypto_account", "crypto_olm_session", "crypto_olm_message_hash"}
	keyTables = append([]string{"crypto_megolm_inbound_session", "sendertrust_claim", "sendertrust_sender", "sendertrust_signature"}, olmTables...)
)

// FuzzToDeviceEvent: a to-device event, as it is in a /sync. It did not pass any device that the bot knows, or it is one of the letters that
// did: only those leave anything in the database but a notice that a key is withheld, and that one is the sender's own.
func FuzzToDeviceEvent(f *testing.F) {
	w := newFuzzWorld(f)
	for _, seed := range w.toDeviceSeeds() {
		f.Add([]byte(rawJSON(seed)))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if !json.Valid(raw) {
			t.Skip("FuzzSyncAnswer is about those")
		}
		r := w.begin(t, len(raw), RequireNothing)
		defer r.end()
		r.deliver(raw)
		evidence := w.evidence()
		switch letter, genuine := w.letterIn(raw); {
		case genuine:
			from := letter.from
			evidence.receive(from.owner.userID, from.senderKey(), from.signingKey(), letter.session.id(), rawJSON(from.keys()))
			r.unchangedBut("a letter came", keyTables...)
			if claim := must(r.hook.store.claim(r.ctx, letter.session.id(), from.senderKey())); claim == nil && sameJSON(raw, rawJSON(letter.event)) {
				t.Errorf("a room key that %s has sent is lost", from.deviceID)
			}
		case letter != nil:
			r.unchangedBut("a letter came in another one's name", olmTables...)
		default:
			r.unchangedBut("the event is from no device", w.withheldTable(raw)...)
		}
		r.resolve()
		r.checkTrust(evidence)
		for _, path := range r.network.requests("sendToDevice/") {
			if !strings.HasPrefix(path, "sendToDevice/m.room_key.withheld/") && !strings.HasPrefix(path, "sendToDevice/org.matrix.room_key.withheld/") {
				t.Errorf("the bot answers by %s", path)
			}
		}
	})
}

// letterIn says which letter is in the event, if one is on its sender key, and whether it came in its sender's name.
func (w *fuzzWorld) letterIn(raw []byte) (_ *letter, genuine bool) {
	var evt struct {
		Sender  id.UserID                   `json:"sender"`
		Content event.EncryptedEventContent `json:"content"`
	}
	if json.Unmarshal(raw, &evt) != nil {
		return nil, false
	}
	for i, l := range w.letters {
		ciphertext := l.event["content"].(object)["ciphertext"].(object)[w.own.IdentityKey().String()].(object)
		came := evt.Content.OlmCiphertext[w.own.IdentityKey()]
		if sameBase64(came.Body, ciphertext["body"].(string)) && evt.Content.SenderKey == l.from.senderKey() {
			return &w.letters[i], evt.Sender == l.from.owner.userID
		}
	}
	return nil, false
}

// withheldTable is where a notice that a key is withheld may be noted.
func (w *fuzzWorld) withheldTable(raw []byte) []string {
	var evt struct {
		Type string `json:"type"`
	}
	if json.Unmarshal(raw, &evt) == nil && slices.Contains([]string{"m.room_key.withheld", "org.matrix.room_key.withheld"}, evt.Type) {
		return []string{"sendertrust_withheld"}
	}
	return nil
}

func (w *fuzzWorld) toDeviceSeeds() (seeds []object) {
	from := func(sender id.UserID, eventType string, content object) object {
		return object{"type": eventType, "sender": sender.String(), "content": content}
	}
	for _, l := range w.letters {
		seeds = append(seeds, l.event)
	}
	stolen := w.letters[0].event
	resent := from(w.eve.userID, "m.room.encrypted", stolen["content"].(object))
	forged := from(w.alice.userID, "m.room.encrypted", object{
		"algorithm": string(id.AlgorithmOlmV1), "sender_key": w.devices[fuzzEve][fuzzSigned].senderKey().String(), "ciphertext": stolen["content"].(object)["ciphertext"],
	})
	megolm := w.said[0].content
	forwarded := wantedSession.roomKey()
	forwarded["sender_key"], forwarded["sender_claimed_ed25519_key"] = w.said[0].from.senderKey().String(), w.said[0].from.signingKey().String()
	forwarded["forwarding_curve25519_key_chain"] = []any{}
	request := object{
		"action": "request", "request_id": "r", "requesting_device_id": "EVE",
		"body": object{"algorithm": string(id.AlgorithmMegolmV1), "room_id": trustRoom.String(), "session_id": w.said[0].content["session_id"]},
	}
	return append(seeds, resent, forged,
		from(w.alice.userID, "m.room.encrypted", megolm),
		from(w.alice.userID, "m.room_key", w.fresh[w.devices[fuzzAlice][fuzzSigned]].roomKey()),
		from(w.alice.userID, "m.forwarded_room_key", forwarded),
		from(w.bot.userID, "m.forwarded_room_key", forwarded),
		from(w.alice.userID, "m.room_key.withheld", object{
			"algorithm": string(id.AlgorithmMegolmV1), "room_id": trustRoom.String(), "session_id": "session", "sender_key": "key", "code": "m.blacklisted",
		}),
		from(w.eve.userID, "m.room_key.withheld", object{"algorithm": string(id.AlgorithmOlmV1), "sender_key": "key", "code": "m.no_olm"}),
		from(w.eve.userID, "m.room_key_request", request),
		from(w.bot.userID, "m.room_key_request", request),
		from(w.eve.userID, "m.secret.request", object{"action": "request", "name": "m.cross_signing.master", "request_id": "r", "requesting_device_id": "EVE"}),
		from(w.bot.userID, "m.secret.request", object{"action": "request", "name": "m.megolm_backup.v1", "request_id": "r", "requesting_device_id": "BOTDEVICE"}),
		from(w.eve.userID, "m.secret.send", object{"request_id": "r", "secret": "secret"}),
		from(w.eve.userID, "m.dummy", object{}),
		from(w.eve.userID, "m.key.verification.request", object{"from_device": "EVE", "transaction_id": "t", "methods": []any{"m.sas.v1"}, "timestamp": 1}),
		object{"type": 5, "sender": []any{}, "content": "text"},
		object{},
	)
}

// FuzzOlmPayload: what one of four devices encrypts for the bot, in the name of whom the server says.
func FuzzOlmPayload(f *testing.F) {
	w := newFuzzWorld(f)
	for device := range byte(4) {
		from := w.devices[device/2][device%2]
		for _, payload := range w.payloadSeeds(from) {
			f.Add(device, device/2, []byte(rawJSON(payload)))
		}
		f.Add(device, device/2, []byte("null"))
		f.Add(device, device/2, []byte(`{"type":"m.room_key"}`))
	}
	// Alice's own letter in Eve's name, Eve's in Alice's, and one in the bot's own.
	alices, eves := w.devices[fuzzAlice][fuzzSigned], w.devices[fuzzEve][fuzzSigned]
	f.Add(byte(0), byte(1), []byte(rawJSON(w.payload(alices, "m.room_key", w.fresh[alices].roomKey()))))
	inOthersName := w.payload(eves, "m.room_key", w.fresh[eves].roomKey())
	for as, sender := range w.names() {
		inOthersName["sender"] = sender.String()
		f.Add(byte(2), byte(as), []byte(rawJSON(inOthersName)))
	}
	f.Fuzz(func(t *testing.T, device, as byte, payload []byte) {
		names := w.names()
		w.payloadCame(t, w.devices[device/2%2][device%2], names[int(as)%len(names)], payload)
	})
}

// names are in whose name the server may hand over an Olm message.
func (w *fuzzWorld) names() []id.UserID {
	return []id.UserID{w.alice.userID, w.eve.userID, w.bot.userID, "@nobody:test"}
}

// payloadCame has a device encrypt the payload, and sees what the bot makes of it.
func (w *fuzzWorld) payloadCame(t *testing.T, from *actorDevice, as id.UserID, payload []byte) {
	t.Helper()
	if len(payload) == 0 {
		t.Skip("Olm encrypts nothing that is empty")
	}
	sender := *from
	sender.olm = olm.NewBlankSession()
	if err := sender.olm.Unpickle(slices.Clone(w.ratchets[from]), []byte("pickle")); err != nil {
		t.Fatal(err)
	}
	r := w.begin(t, len(payload), RequireNothing)
	defer r.end()
	r.deliver(rawJSON(w.encrypt(&sender, as, payload)))

	evidence := w.evidence()
	claimed, key := roomKeyIn(payload)
	ours := claimed.Sender == as && claimed.Recipient == w.bot.userID && claimed.RecipientKeys.Ed25519 == w.own.SigningKey()
	switch {
	case ours && key != nil && mautrixTakes(claimed.SenderDeviceKeys, as, from.senderKey()):
		// A key that is skipped, for example since its algorithm is another one, shows nothing.
		if now := r.changed(); slices.ContainsFunc(now, func(table string) bool { return strings.HasPrefix(table, "sendertrust_") }) {
			evidence.receive(as, from.senderKey(), claimed.Keys.Ed25519, key.ID(), claimed.SenderDeviceKeys)
		}
		r.unchangedBut("a room key came", keyTables...)
	case strings.Contains(claimed.Type, "key_bundle"):
		r.unchangedBut("a bundle was announced", append(olmTables, "sendertrust_key_bundle")...)
	default:
		r.unchangedBut("no room key came", olmTables...)
	}
	r.resolve()
	r.checkTrust(evidence)
}

// claimedPayload is what an Olm message claims.
type claimedPayload struct {
	Type             string          `json:"type"`
	Sender           id.UserID       `json:"sender"`
	Recipient        id.UserID       `json:"recipient"`
	Keys             claimedKeys     `json:"keys"`
	RecipientKeys    claimedKeys     `json:"recipient_keys"`
	SenderDeviceKeys json.RawMessage `json:"sender_device_keys"`
	Content          json.RawMessage `json:"content"`
}

type claimedKeys struct {
	Ed25519 id.Ed25519 `json:"ed25519"`
}

// roomKeyIn gives the Megolm session whose key is in an Olm message, or nil.
func roomKeyIn(payload []byte) (claimed claimedPayload, session olm.InboundGroupSession) {
	var content struct {
		SessionID  id.SessionID `json:"session_id"`
		SessionKey string       `json:"session_key"`
	}
	if json.Unmarshal(payload, &claimed) != nil || claimed.Type != "m.room_key" || json.Unmarshal(claimed.Content, &content) != nil {
		return claimed, nil
	}
	session, err := olm.NewInboundGroupSession([]byte(content.SessionKey))
	if err != nil || session.ID() != content.SessionID {
		return claimed, nil
	}
	return claimed, session
}

// payloadSeeds are what honest and hostile devices say.
func (w *fuzzWorld) payloadSeeds(from *actorDevice) (seeds []object) {
	key := func(changes ...func(payload object)) {
		payload := w.payload(from, "m.room_key", w.fresh[from].roomKey())
		for _, change := range changes {
			change(payload)
		}
		seeds = append(seeds, payload)
	}
	content := func(field string, value any) func(object) {
		return func(payload object) { payload["content"].(object)[field] = value }
	}
	key()
	key(withoutDeviceKeys)
	for _, keys := range w.keySeeds(from) {
		key(embedding(keys))
	}
	others := w.said[0].from
	key(func(payload object) { payload["keys"] = object{"ed25519": others.signingKey().String()} })
	key(func(payload object) { payload["recipient"] = others.owner.userID.String() })
	key(func(payload object) { payload["recipient_keys"] = object{"ed25519": others.signingKey().String()} })
	key(content("session_id", w.shared[others].id().String()))
	key(content("room_id", "!other:test"))
	key(content("algorithm", string(id.AlgorithmOlmV1)))
	key(content("session_key", w.shared[others].key), content("session_id", w.shared[others].id().String()))
	key(content("m.relates_to", []any{1}), content("org.matrix.msc3061.shared_history", true))
	forwarded := wantedSession.roomKey()
	forwarded["sender_key"], forwarded["sender_claimed_ed25519_key"] = others.senderKey().String(), others.signingKey().String()
	forwarded["forwarding_curve25519_key_chain"] = []any{}
	return append(seeds,
		w.payload(from, "m.forwarded_room_key", forwarded),
		w.payload(from, bundleType, object{"room_id": trustRoom.String(), "file": object{
			"url": "mxc://server.test/bundle", "v": "v2", "hashes": object{"sha256": strings.Repeat("A", 43)}, "iv": strings.Repeat("A", 22),
			"key": object{"kty": "oct", "alg": "A256CTR", "ext": true, "k": strings.Repeat("A", 43), "key_ops": []any{"encrypt", "decrypt"}},
		}}),
		w.payload(from, "m.secret.send", object{"request_id": "r", "secret": "secret"}),
		w.payload(from, "m.dummy", object{}),
		w.payload(from, "m.room.encrypted", w.said[0].content),
	)
}

// keySeeds are device keys as they may be shown of a device: honest ones, and forgeries by whoever lacks the owner's keys.
func (w *fuzzWorld) keySeeds(d *actorDevice) (seeds []object) {
	owner := d.owner
	change := func(change func(keys object)) {
		keys := d.selfSignedKeys()
		change(keys)
		seeds = append(seeds, keys)
	}
	other := w.eve
	if owner == w.eve {
		other = w.alice
	}
	signed := func(keys object) { signInto(keys, owner.userID, owner.selfSigningKey().String(), owner.selfSigning) }
	change(func(object) {})
	change(signed)
	change(func(keys object) {
		putSignature(keys, owner.userID, owner.selfSigningKey().String(), strings.Repeat("A", 86))
	})
	change(func(keys object) { signInto(keys, owner.userID, owner.selfSigningKey().String(), other.selfSigning) })
	change(func(keys object) { signInto(keys, owner.userID, other.selfSigningKey().String(), other.selfSigning) })
	change(func(keys object) { signInto(keys, other.userID, other.selfSigningKey().String(), other.selfSigning) })
	change(func(keys object) { signInto(keys, owner.userID, owner.masterKey().String(), owner.master) })
	change(func(keys object) {
		signed(keys)
		keys["unsigned"] = object{"device_display_name": "phone"}
	})
	change(func(keys object) {
		signed(keys)
		keys["dehydrated"] = false
	})
	change(func(keys object) {
		delete(keys, "signatures")
		keys["extra"], keys["dehydrated"] = object{"number": 7, "text": "<&>\u2028é"}, true
		signInto(keys, owner.userID, d.deviceID.String(), d.account)
		signed(keys)
	})
	change(func(keys object) {
		signed(keys)
		keys["keys"].(object)["curve25519:"+d.deviceID.String()] = w.devices[fuzzEve][fuzzUnsigned].senderKey().String()
	})
	for _, name := range []string{owner.selfSigningKey().String(), owner.masterKey().String()} {
		named := *d
		named.deviceID = id.DeviceID(name)
		seeds = append(seeds, named.selfSignedKeys())
	}
	inOthersName := &actorDevice{owner: other, deviceID: d.deviceID, account: d.account}
	return append(seeds, inOthersName.selfSignedKeys(), object{}, object{"user_id": owner.userID.String()})
}

// FuzzSenderDeviceKeys: the sender_device_keys (MSC4147) of a room key that is good otherwise. Its session is proven only if crypto/ed25519
// says that the sender's self-signing key has signed these very keys, or if the server has shown them signed before.
func FuzzSenderDeviceKeys(f *testing.F) {
	w := newFuzzWorld(f)
	for device := range byte(4) {
		for _, keys := range w.keySeeds(w.devices[device/2][device%2]) {
			f.Add(device, []byte(rawJSON(keys)))
		}
		// What a parser reads and what a signature covers may differ where a name is there twice.
		genuine := string(rawJSON(w.devices[device/2][fuzzSigned].keys()))
		claimed := string(rawJSON(w.devices[device/2][device%2].selfSignedKeys()))
		f.Add(device, []byte(strings.TrimSuffix(genuine, "}")+","+strings.TrimPrefix(claimed, "{")))
		f.Add(device, []byte(strings.TrimSuffix(claimed, "}")+","+strings.TrimPrefix(genuine, "{")))
		f.Add(device, []byte(`null`))
		f.Add(device, []byte(`[]`))
	}
	f.Fuzz(func(t *testing.T, device byte, keys []byte) {
		if !json.Valid(keys) {
			t.Skip("FuzzOlmPayload is about those")
		}
		from := w.devices[device/2%2][device%2]
		payload := w.payload(from, "m.room_key", w.fresh[from].roomKey())
		payload["sender_device_keys"] = json.RawMessage(keys)
		w.payloadCame(t, from, from.owner.userID, rawJSON(payload))
	})
}

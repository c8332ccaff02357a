package cryptohook

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// twins are two receivers of the same messages: one receives what it can together, the other one by one.
type twins struct {
	*story
	t               *testing.T
	together, alone *receiver
	// passed is what the handlers of each have seen of what came between devices.
	passed [2][]string
	shared []*megolm
	last   object
}

func newTwins(t *testing.T) *twins {
	t.Helper()
	sqliteOnly(t)
	w := &twins{story: newStory(t, newDatabase(t), 4), t: t}
	other := copyDatabase(t, w.seed)
	w.together, w.alone = w.open(t, w.seed), w.open(t, other)
	w.alone.oneByOne = true
	for i, r := range []*receiver{w.together, w.alone} {
		t.Cleanup(r.close)
		for _, eventType := range []event.Type{{Type: "test.ping", Class: event.ToDeviceEventType}, event.ToDeviceEncrypted, event.ToDeviceRoomKey} {
			r.syncer.OnEventType(eventType, func(_ context.Context, evt *event.Event) {
				w.passed[i] = append(w.passed[i], fmt.Sprint(evt.Type.Type, evt.Sender, string(rawJSON(evt.Content.Raw)), evt.Mautrix.WasEncrypted))
			})
		}
	}
	for _, p := range w.peers {
		w.receive(w.key(p))
	}
	return w
}

// receive hands the events of one /sync to both, and compares what becomes of them.
func (w *twins) receive(events ...object) {
	w.t.Helper()
	sync := w.sync(events, nil)
	w.Syncs = append(w.Syncs, sync)
	for _, r := range []*receiver{w.together, w.alone} {
		if err := r.process(w.t.Context(), sync); err != nil {
			w.t.Fatal(err)
		}
	}
	together, alone := w.left(w.together, 0), w.left(w.alone, 1)
	for what := range together {
		if together[what] != alone[what] {
			w.t.Fatalf("%s\n%s\none by one\n%s\n/sync %s", what, together[what], alone[what], sync)
		}
	}
}

// left is all that the messages have left behind, but for the times.
func (w *twins) left(r *receiver, twin int) map[string]string {
	left := map[string]string{"handlers": strings.Join(w.passed[twin], "\n")}
	for table, columns := range map[string]string{
		"crypto_olm_message_hash": "hex(message_hash)",
		"crypto_olm_session":      "session_id || sender_key || hex(session)",
		"crypto_megolm_inbound_session": "session_id || sender_key || signing_key || room_id || quote(hex(session)) || quote(max_age) || quote(max_messages) || " +
			"quote(is_scheduled) || quote(shared_history) || key_source || source_user || forwarding_chains",
		"sendertrust_session": "session_id || sender_key || signing_key || room_id || sender || source || legacy_session || state || reason || device_id || " +
			"master_key || quote(device_keys) || quote(embedded) || retry_count || (next_retry_time_ms IS NULL)",
		"sendertrust_signature": "sender_id || self_signing_key || quote(device_keys)",
		"sendertrust_sender":    "user_id || identity_key || signing_key",
		"crypto_account":        "hex(account)",
	} {
		left[table] = strings.Join(scanStrings(r.db.RawDB, fmt.Sprintf("SELECT %s FROM %s ORDER BY 1", columns, table)), "\n")
	}
	return left
}

// key is a new room key of a peer.
func (w *twins) key(p *peer) object {
	w.shared = append(w.shared, newMegolm(storyRoom))
	return w.encrypt(p, "m.room_key", w.shared[len(w.shared)-1].roomKey())
}

// payload is a room key whose Olm payload a test changes.
func (w *twins) payload(p *peer, change func(payload object)) object {
	payload := w.plain(p)
	change(payload)
	return w.text(p, string(rawJSON(payload)))
}

// plain is what is encrypted of a room key.
func (w *twins) plain(p *peer) object {
	return object{
		"type": "m.room_key", "content": newMegolm(storyRoom).roomKey(), "sender": p.owner.userID.String(),
		"sender_device_keys": p.keys(), "keys": object{"ed25519": p.signingKey().String()},
		"recipient": receiverUser.String(), "recipient_keys": object{"ed25519": w.receiver.SigningKey().String()},
	}
}

// text is an Olm message with any text.
func (w *twins) text(p *peer, text string) object {
	messageType, body, err := p.olm.Encrypt([]byte(text))
	if err != nil {
		w.t.Fatal(err)
	}
	return object{
		"type": "m.room.encrypted", "sender": p.owner.userID.String(),
		"content": object{
			"algorithm": string(id.AlgorithmOlmV1), "sender_key": p.senderKey().String(),
			"ciphertext": object{w.receiver.IdentityKey().String(): object{"type": int(messageType), "body": string(body)}},
		},
	}
}

func content(change func(content object)) func(payload object) {
	return func(payload object) { change(payload["content"].(object)) }
}

func outside(evt object, change func(evt object)) object {
	change(evt)
	return evt
}

func ciphertext(w *twins, evt object) object {
	return evt["content"].(object)["ciphertext"].(object)[w.receiver.IdentityKey().String()].(object)
}

// oddMessages are messages between devices that are no room keys like the others.
var oddMessages = map[string]func(w *twins, p *peer) object{
	"a key":              func(w *twins, p *peer) object { return w.key(p) },
	"the last one again": func(w *twins, p *peer) object { return w.last },
	"dummy":              func(w *twins, p *peer) object { return w.encrypt(p, "m.dummy", object{}) },
	"a secret": func(w *twins, p *peer) object {
		return w.encrypt(p, "m.secret.send", object{"request_id": "r", "secret": "s"})
	},
	"of a handler": func(w *twins, p *peer) object { return w.encrypt(p, "test.ping", object{"text": "hello"}) },
	"a key that is sent on": func(w *twins, p *peer) object {
		return w.encrypt(p, "m.forwarded_room_key", newMegolm(storyRoom).roomKey())
	},
	"in the clear": func(w *twins, p *peer) object {
		return object{"type": "m.room_key", "sender": p.owner.userID.String(), "content": newMegolm(storyRoom).roomKey()}
	},
	"under another name": func(w *twins, p *peer) object {
		return outside(w.key(p), func(evt object) { evt["sender"] = "@eve:test" })
	},
	"another sender key": func(w *twins, p *peer) object {
		return outside(w.key(p), func(evt object) { evt["content"].(object)["sender_key"] = w.peers[0].signingKey().String() })
	},
	"another algorithm": func(w *twins, p *peer) object {
		return outside(w.key(p), func(evt object) { evt["content"].(object)["algorithm"] = "m.olm.v2" })
	},
	"for another device": func(w *twins, p *peer) object {
		return outside(w.key(p), func(evt object) { evt["to_user_id"], evt["to_device_id"] = receiverUser.String(), "OTHER" })
	},
	"another ciphertext": func(w *twins, p *peer) object {
		return outside(w.key(p), func(evt object) { ciphertext(w, evt)["body"] = "AwAAAAAA" })
	},
	"no base64": func(w *twins, p *peer) object {
		return outside(w.key(p), func(evt object) { ciphertext(w, evt)["body"] = "!!!" })
	},
	"an odd type": func(w *twins, p *peer) object {
		return outside(w.key(p), func(evt object) { ciphertext(w, evt)["type"] = 7 })
	},
	"a ciphertext that is none": func(w *twins, p *peer) object {
		return outside(w.key(p), func(evt object) { evt["content"].(object)["ciphertext"] = []any{1} })
	},
	"no JSON":          func(w *twins, p *peer) object { return w.text(p, "hello") },
	"null":             func(w *twins, p *peer) object { return w.text(p, "null") },
	"an empty payload": func(w *twins, p *peer) object { return w.text(p, "{}") },
	"another recipient": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["recipient"] = "@eve:test" })
	},
	"another recipient's keys": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["recipient_keys"] = object{"ed25519": p.signingKey().String()} })
	},
	"another sender inside": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["sender"] = "@eve:test" })
	},
	"another ed25519 key": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["keys"] = object{"ed25519": w.receiver.SigningKey().String()} })
	},
	"no ed25519 key": func(w *twins, p *peer) object { return w.payload(p, func(payload object) { delete(payload, "keys") }) },
	"no ed25519 key, no device": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) {
			delete(payload, "keys")
			delete(payload, "sender_device_keys")
		})
	},
	"no device keys": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { delete(payload, "sender_device_keys") })
	},
	"device keys of another": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["sender_device_keys"] = w.peers[0].keys() })
	},
	"device keys not signed": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { delete(payload["sender_device_keys"].(object), "signatures") })
	},
	"forged device keys": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["sender_device_keys"] = p.forgedKeys() })
	},
	"device keys not crossed": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["sender_device_keys"] = p.selfSignedKeys() })
	},
	"device keys of a namesake": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) {
			payload["sender_device_keys"] = p.ownKeys("@eve:test", p.senderKey().String(), p.signingKey().String(), p.account)
		})
	},
	"device keys, other curve": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) {
			payload["sender_device_keys"] = p.ownKeys(p.owner.userID, w.receiver.IdentityKey().String(), p.signingKey().String(), p.account)
		})
	},
	"device keys, other signer": func(w *twins, p *peer) object {
		other := w.peers[0]
		return w.payload(p, func(payload object) {
			payload["sender_device_keys"] = p.ownKeys(p.owner.userID, p.senderKey().String(), other.signingKey().String(), other.account)
			payload["keys"] = object{"ed25519": other.signingKey().String()}
		})
	},
	"device keys, null": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["sender_device_keys"] = nil })
	},
	"device keys, twice": func(w *twins, p *peer) object {
		const member = `"sender_device_keys":`
		return w.text(p, strings.Replace(string(rawJSON(w.plain(p))), member, member+`{"x":1},`+member, 1))
	},
	"device keys, a list": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["sender_device_keys"] = []any{} })
	},
	"device keys, an unknown": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["sender_device_keys"].(object)["x"] = 1 })
	},
	"device keys with a name": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) {
			payload["sender_device_keys"].(object)["unsigned"] = object{"device_display_name": "phone"}
		})
	},
	"a type that is a number": func(w *twins, p *peer) object { return w.payload(p, func(payload object) { payload["type"] = 7 }) },
	"a sender_device of number": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["sender_device"] = 7 })
	},
	"no type": func(w *twins, p *peer) object { return w.payload(p, func(payload object) { delete(payload, "type") }) },
	"no content": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { delete(payload, "content") })
	},
	"content of null": func(w *twins, p *peer) object { return w.payload(p, func(payload object) { payload["content"] = nil }) },
	"content, a list": func(w *twins, p *peer) object {
		return w.payload(p, func(payload object) { payload["content"] = []any{} })
	},
	"a key for another method": func(w *twins, p *peer) object {
		return w.payload(p, content(func(c object) { c["algorithm"] = "m.megolm.v2" }))
	},
	"another session's ID": func(w *twins, p *peer) object {
		return w.payload(p, content(func(c object) { c["session_id"] = newMegolm(storyRoom).id().String() }))
	},
	"a broken key": func(w *twins, p *peer) object {
		return w.payload(p, content(func(c object) { c["session_key"] = "AgAAAA" }))
	},
	"a key of a number": func(w *twins, p *peer) object { return w.payload(p, content(func(c object) { c["session_key"] = 7 })) },
	"a key with limits": func(w *twins, p *peer) object {
		return w.payload(p, content(func(c object) { c["com.beeper.max_age_ms"], c["com.beeper.max_messages"] = 1000, 3 }))
	},
	"a key for another room": func(w *twins, p *peer) object {
		return w.payload(p, content(func(c object) { c["room_id"] = "!other:test" }))
	},
	"somebody's session": func(w *twins, p *peer) object { return w.encrypt(p, "m.room_key", w.shared[len(w.shared)/2].roomKey()) },
	"somebody's for a room": func(w *twins, p *peer) object {
		return w.encrypt(p, "m.room_key", w.shared[len(w.shared)/2].forRoom("!other:test"))
	},
	"a later key": func(w *twins, p *peer) object { return w.encrypt(p, "m.room_key", newMegolm(storyRoom).later()) },
	"a withheld key": func(w *twins, p *peer) object {
		return object{"type": "m.room_key.withheld", "sender": p.owner.userID.String(), "content": object{
			"algorithm": string(id.AlgorithmMegolmV1), "code": "m.unverified", "room_id": storyRoom.String(), "session_id": withheldSession, "sender_key": p.senderKey().String(),
		}}
	},
	"a new Olm session": func(w *twins, p *peer) object {
		if len(w.free) == 0 {
			return w.key(p)
		}
		p.olm = nil
		return w.key(p)
	},
}

// ownKeys are device keys that are signed by whom they name, whatever they name.
func (p *peer) ownKeys(userID id.UserID, curve25519, ed25519 string, by jsonSigner) object {
	keys := object{
		"user_id": userID.String(), "device_id": p.deviceID.String(), "algorithms": []any{},
		"keys": object{"curve25519:" + p.deviceID.String(): curve25519, "ed25519:" + p.deviceID.String(): ed25519},
	}
	signInto(keys, userID, p.deviceID.String(), by)
	return keys
}

// odd makes a message by its name.
func (w *twins) odd(name string, p *peer) object {
	made := oddMessages[name](w, p)
	if made == nil {
		made = w.key(p)
	}
	var copied object // the same message may be sent again
	if err := json.Unmarshal(rawJSON(made), &copied); err != nil {
		w.t.Fatal(err)
	}
	w.last = made
	return copied
}

func oddNames() []string {
	names := make([]string, 0, len(oddMessages))
	for name := range oddMessages {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// What is received together leaves behind what it leaves behind when it is received one by one, whatever is among it.
func TestReceivedTogetherIsAsOneByOne(t *testing.T) {
	w := newTwins(t)
	for _, name := range oddNames() {
		for _, p := range []*peer{w.peers[1], w.peers[3]} {
			w.receive(w.odd("a key", w.peers[1]), w.odd("a key", p), w.odd(name, p), w.odd("a key", w.peers[2]), w.odd("a key", p))
		}
	}
	if count := w.together.count("SELECT COUNT(*) FROM crypto_megolm_inbound_session"); count < 4*len(oddMessages) {
		t.Errorf("only %d sessions have come through", count)
	}
}

func TestRandomMessagesAreReceivedTogetherAsOneByOne(t *testing.T) {
	w := newTwins(t)
	names := oddNames()
	seed := [32]byte([]byte("what comes together, any order.."))
	dice := rand.New(rand.NewChaCha8(seed))
	for range 60 {
		var events []object
		for range dice.IntN(12) {
			name := "a key"
			if dice.IntN(3) == 0 {
				name = names[dice.IntN(len(names))]
			}
			events = append(events, w.odd(name, w.peers[dice.IntN(len(w.peers))]))
		}
		w.receive(events...)
	}
}

func FuzzReceivedTogether(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7})
	f.Add([]byte{10, 0, 10, 0, 200, 17, 33})
	f.Fuzz(func(t *testing.T, script []byte) {
		w := newTwins(t)
		names := oddNames()
		var events []object
		for i, b := range script[:min(len(script), 40)] {
			events = append(events, w.odd(names[int(b)%len(names)], w.peers[i%len(w.peers)]))
		}
		w.receive(events...)
	})
}

// Most room keys are to be received together: else all of this is for nothing.
func TestRoomKeysAreReceivedTogether(t *testing.T) {
	w := newTwins(t)
	var events []object
	for range 3 * longestRun {
		events = append(events, w.key(w.peers[1]))
	}
	runs := 0
	looked := &watched{unitOfWork: w.together.uow, beforeMessage: func() { runs++ }}
	w.together.mach.CryptoStore = looked
	w.receive(events...)
	if runs > 0 {
		t.Errorf("%d of %d room keys were received one by one", runs, len(events))
	}
}

// A crowd of new devices has no sessions: each attempt to receive theirs together is in vain, and there are few.
func TestAttemptsInVainAreFew(t *testing.T) {
	r := newReceiving(nil)
	attempts := 0
	for range 1000 {
		if r.pause > 0 {
			r.pause--
			continue
		}
		attempts++
		r.paused(true)
	}
	if attempts > 20 {
		t.Errorf("%d attempts for 1,000 events", attempts)
	}
	r.paused(false)
	if r.inVain != 0 {
		t.Error("an attempt that was not in vain is counted")
	}
}

// mautrix lends its Olm lock by a way of ours: see withOlmLock.
func TestAssumptionOlmLockIsHeld(t *testing.T) {
	w := newTwins(t)
	r := w.together
	lock := (*sync.Mutex)(reflect.ValueOf(r.mach).Elem().FieldByName("olmLock").Addr().UnsafePointer())
	ran := false
	err := r.withOlmLock(t.Context(), func() {
		if ran = true; lock.TryLock() {
			t.Error("the lock is not held")
			lock.Unlock()
		}
	})
	if err != nil || !ran {
		t.Fatalf("ran: %v (%v)", ran, err)
	}
	if !lock.TryLock() {
		t.Error("the lock is still held")
	} else {
		lock.Unlock()
	}
	if asked := r.network.count("keys/claim") + r.network.count("keys/query") + r.network.count("sendToDevice"); asked != 0 {
		t.Errorf("%d requests were made", asked)
	}
}

// Without the lock nothing is lost: what would come together comes one by one.
func TestWithoutTheLockKeysAreReceivedOneByOne(t *testing.T) {
	w := newTwins(t)
	w.together.mach.CryptoStore = &lockless{w.together.uow}
	w.receive(w.key(w.peers[1]), w.key(w.peers[1]), w.key(w.peers[2]))
	if count := w.together.count("SELECT COUNT(*) FROM crypto_megolm_inbound_session"); count != 4+3 {
		t.Errorf("%d sessions have come through", count)
	}
}

// lockless is the store of a version of mautrix that does not ask it under its lock.
type lockless struct{ *unitOfWork }

func (l *lockless) GetDevice(context.Context, id.UserID, id.DeviceID) (*id.Device, error) {
	return nil, errors.New("nobody asks for a device any more")
}

// panicking is an Olm session that panics at its second message.
type panicking struct {
	olm.Session
	messages int
}

func (p *panicking) Decrypt(message string, kind id.OlmMsgType) ([]byte, error) {
	if p.messages++; p.messages == 2 {
		panic("a message that it cannot bear")
	}
	return p.Session.Decrypt(message, kind)
}

// What mautrix panics about in a run undoes the run. One by one nothing of it is lost.
func TestPanicInARunLosesNothing(t *testing.T) {
	w := newTwins(t)
	session := must(w.together.uow.GetSessions(t.Context(), w.peers[1].senderKey()))[0]
	broken := &panicking{Session: session.Internal}
	session.Internal = broken
	w.receive(w.key(w.peers[1]), w.key(w.peers[1]), w.key(w.peers[2]), w.key(w.peers[1]))
	if broken.messages != 2 || session.Internal == olm.Session(broken) {
		t.Errorf("the session was tried %d times, and is the same: %v", broken.messages, session.Internal == olm.Session(broken))
	}
	w.receive(w.key(w.peers[1]), w.key(w.peers[1]))
	if count := w.together.count("SELECT COUNT(*) FROM crypto_megolm_inbound_session"); count != 4+6 {
		t.Errorf("%d sessions have come through", count)
	}
}

// What a device says of itself is read when its first keys come, and not in the next /syncs.
func TestSentKeysAreReadOnce(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	w.know(alice.owner)
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}}) // an Olm session begins, which is not received together
	sent := rawJSON(alice.keys())
	var first *mautrix.DeviceKeys
	for range 3 {
		s := newMegolm(trustRoom)
		w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom)), w.share(alice, s)}})
		w.wantState(s, alice, StateSenderUnverified)
		remembered, known := w.hook.sentKeys.look(sha256.Sum256(sent))
		if !known {
			t.Fatal("the keys are not remembered")
		}
		if first = cmp.Or(first, remembered.keys); remembered.keys != first {
			t.Error("the same keys were read again")
		}
		if anew := newSentKeys().read(sent); !reflect.DeepEqual(remembered, anew) {
			t.Errorf("what is remembered of the keys was changed: %+v, was %+v", remembered, anew)
		}
	}
}

// Somebody who sends other keys with each message makes the bot hold no more of them than it should.
func TestSentKeysAreForgotten(t *testing.T) {
	keys, device := newSentKeys(), newActor("@alice:test").addDevice("ALICE").keys()
	held := func() (bytes int) {
		for _, generation := range []map[digest]sentDeviceKeys{keys.newer, keys.older} {
			for _, sent := range generation {
				bytes += len(sent.embedded)
			}
		}
		return bytes
	}
	for i := range 200 {
		device["unsigned"] = object{"device_display_name": strings.Repeat("x", 10_000) + fmt.Sprint(i)}
		keys.read(rawJSON(device))
		if i == 20 && held() < 20*10_000 {
			t.Fatalf("%d bytes are held of 21 devices", held())
		}
		if most := 2*sentKeysInGeneration + 2*11_000; held() > most {
			t.Fatalf("%d bytes are held after %d devices, more than %d", held(), i+1, most)
		}
	}
}

// What was tried with an Olm session is undone by what is stored of it. If that cannot be read, nothing that came with it is stored, and it comes again.
func TestOlmSessionsThatCannotBeRestoredLoseNothing(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	w.know(alice.owner)
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
	s := newMegolm(trustRoom)
	part := syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom)), w.share(alice, s), w.olmEvent(alice, "m.dummy", object{})}}
	rename := func(from, to string) {
		if _, err := w.db.Exec(w.ctx, "ALTER TABLE "+from+" RENAME TO "+to); err != nil {
			t.Fatal(err)
		}
	}
	rename("crypto_olm_session", "out_of_reach")
	resp, since := w.response(part)
	if err := w.client.Syncer.ProcessResponse(w.ctx, resp, since); !errors.Is(err, ErrUnitOfWorkBroken) || !strings.Contains(err.Error(), "restore") {
		t.Errorf("the /sync was processed: %v", err)
	}
	rename("out_of_reach", "crypto_olm_session")
	w.restart()
	w.sync(part)
	w.wantState(s, alice, StateSenderUnverified)
}

package cryptohook

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// arriving is a room key as mautrix hands it to the hook, with the device's own keys in it.
func arriving(t *testing.T, from *actorDevice, s *megolm) *crypto.DecryptedOlmEvent {
	t.Helper()
	return &crypto.DecryptedOlmEvent{
		Sender: from.owner.userID, SenderKey: from.senderKey(), Keys: crypto.OlmEventKeys{Ed25519: from.signingKey()},
		Type: event.ToDeviceRoomKey, Content: event.Content{VeryRaw: rawJSON(s.roomKey())},
	}
}

// What the keys of one device have in common is worked out once, and gives each the same as if it had come alone.
func TestKeysOfOneDeviceShareAWalk(t *testing.T) {
	w, alice, bob := twoPeople(t)
	var sessions []*megolm
	together := newReceiving(w.hook)
	for _, from := range []*actorDevice{alice, bob, alice, alice} {
		s := newMegolm(trustRoom)
		sessions = append(sessions, s)
		if err := w.hook.receiveRoomKey(together.context(t.Context()), arriving(t, from, s)); err != nil {
			t.Fatal(err)
		}
	}
	if len(together.walks) != 2 {
		t.Errorf("%d walks for 4 keys of 2 devices", len(together.walks))
	}
	if err := w.hook.commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	alone := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, alone)}})
	want := w.row(alone, alice)
	for _, i := range []int{0, 2, 3} {
		row := w.row(sessions[i], alice)
		if row.State != want.State || row.DeviceID != want.DeviceID || row.MasterKey != want.MasterKey || row.State != StateSenderUnverified {
			t.Errorf("key %d: %+v, alone: %+v", i, row, want)
		}
	}
}

// What was worked out is not used any more once something was learnt that may change it.
func TestWalkIsNotSharedBeyondWhatWasLearnt(t *testing.T) {
	w, alice, _ := twoPeople(t)
	together := newReceiving(w.hook)
	receive := func(s *megolm) {
		t.Helper()
		if err := w.hook.receiveRoomKey(together.context(t.Context()), arriving(t, alice, s)); err != nil {
			t.Fatal(err)
		}
	}
	before, after := newMegolm(trustRoom), newMegolm(trustRoom)
	receive(before)
	walks := len(together.walks)
	w.hook.learntInPassing()
	together.walkOf(senderOfWalk{})
	if walks != 1 || len(together.walks) != 0 {
		t.Errorf("%d walks before something was learnt, and %d after it", walks, len(together.walks))
	}
	receive(after)
	w.hook.learning.Add(1) // something is being learnt just now
	together.walkOf(senderOfWalk{})
	if len(together.walks) != 0 {
		t.Errorf("%d walks while something is being learnt", len(together.walks))
	}
	w.hook.learnt.Add(1)
}

// An Olm message that was received is known as that: before the /sync, in it, and when somebody else's commit has come in between.
func TestOlmMessagesThatWereReceivedAreKnown(t *testing.T) {
	w := newTrustWorld(t)
	h := w.hook
	h.uow.gateHeld = true // there is nobody to hold it against
	events := make([]*event.Event, 3)
	hashes := make([][sha256.Size]byte, len(events))
	for i := range events {
		message := []byte(fmt.Sprint("message ", i))
		hashes[i] = sha256.Sum256(message)
		events[i] = &event.Event{Content: event.Content{Parsed: &event.EncryptedEventContent{Algorithm: id.AlgorithmOlmV1, OlmCiphertext: event.OlmCiphertexts{
			h.mach.GetAccount().IdentityKey(): {Type: id.OlmMsgTypeMsg, Body: base64.RawStdEncoding.EncodeToString(message)},
		}}}}
	}
	known := func(r *receiving, i int) bool {
		t.Helper()
		return !must(h.uow.GetOlmHash(r.context(t.Context()), hashes[i])).IsZero()
	}
	put := func(r *receiving, i int) {
		t.Helper()
		if err := h.uow.PutOlmHash(r.context(t.Context()), hashes[i], time.UnixMilli(7)); err != nil {
			t.Fatal(err)
		}
	}
	first := newReceiving(h)
	put(first, 0)
	if err := h.uow.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := newReceiving(h)
	odd := &event.Event{Content: event.Content{Parsed: &event.EncryptedEventContent{Algorithm: id.AlgorithmOlmV1, OlmCiphertext: event.OlmCiphertexts{
		h.mach.GetAccount().IdentityKey(): {Type: id.OlmMsgTypeMsg, Body: "no base64!"},
	}}}}
	if err := second.lookUpHashes(t.Context(), append(events[:2:2], odd, &event.Event{})); err != nil {
		t.Fatal(err)
	}
	if len(second.hashes) != 2 || !known(second, 0) || known(second, 1) {
		t.Errorf("looked up: %v", second.hashes)
	}
	put(second, 1)
	if err := h.uow.flush(t.Context()); err != nil { // as an encryptor does it
		t.Fatal(err)
	}
	if !known(second, 1) {
		t.Error("a message is not known any more after a commit")
	}
	if known(second, 2) {
		t.Error("a message that was not looked up is known")
	}
	h.uow.gateHeld = false
}

// mautrix writes into the device that it gets, and another one may be there once something was learnt.
func TestDevicesAreLookedUpOnceUntilSomethingIsLearnt(t *testing.T) {
	w := newTrustWorld(t)
	r := newReceiving(w.hook)
	looked := 0
	find := func() (*id.Device, error) {
		looked++
		return &id.Device{DeviceID: "PHONE"}, nil
	}
	for range 2 {
		device := must(r.device(deviceOfKey{"@alice:test", "k"}, find))
		if device.Trust != id.TrustStateUnset {
			t.Errorf("the device is as somebody has left it: %v", device.Trust)
		}
		device.Trust = id.TrustStateDeviceKeyMismatch
	}
	must(r.device(deviceOfKey{"@alice:test", "l"}, find))
	must(r.device(deviceOfKey{"@bob:test", "k"}, find))
	if looked != 3 {
		t.Errorf("looked %d times for three devices", looked)
	}
	w.hook.learntInPassing()
	must(r.device(deviceOfKey{"@alice:test", "k"}, find))
	if looked != 4 {
		t.Errorf("looked %d times after something was learnt", looked)
	}
	failed := errors.New("the database is gone")
	if _, err := r.device(deviceOfKey{"@carol:test", "k"}, func() (*id.Device, error) { return nil, failed }); !errors.Is(err, failed) {
		t.Errorf("the error is %v", err)
	}
	if device, err := r.device(deviceOfKey{"@carol:test", "k"}, func() (*id.Device, error) { return nil, nil }); device != nil || err != nil {
		t.Errorf("found %v (%v)", device, err)
	}
}

func TestSideBySideDoesAllOnce(t *testing.T) {
	for _, count := range []int{0, 1, 2, 1000} {
		done := make([]int, count)
		sideBySide(count, func(i int) { done[i]++ })
		for i, times := range done {
			if times != 1 {
				t.Errorf("%d of %d was done %d times", i, count, times)
			}
		}
	}
	defer func() {
		if reason := recover(); reason != "one of them" {
			t.Errorf("the panic was %v", reason)
		}
	}()
	sideBySide(10, func(i int) {
		if i == 7 {
			panic("one of them")
		}
	})
}

func signedClaim() *SenderData {
	return &SenderData{
		SessionID: "s", Sender: "@alice:test", SenderKey: "k", SigningKey: "e", State: StateDeviceInfo, Source: SourceDirect,
		signers: []signer{{key: "S", object: []byte(`{"a":1}`)}},
	}
}

// A device and its signatures are noted once, and again if the transaction came to nothing.
func TestSignersAreNotedAgainAfterARollback(t *testing.T) {
	h, ctx := newTrustWorld(t).hook, t.Context()
	rolledBack := errors.New("rolled back")
	noteTwice := func(news bool, end error) {
		t.Helper()
		h.uow.stage(func(ctx context.Context) error {
			for _, want := range []bool{news, false} {
				if got, err := h.noteSigners(ctx, signedClaim()); err != nil || got != want {
					t.Errorf("news: %t, want %t (%v)", got, want, err)
				}
			}
			return end
		})
		if err := h.uow.flush(ctx); !errors.Is(err, end) {
			t.Error(err)
		}
		h.uow.clear()
	}
	noteTwice(true, rolledBack)
	noteTwice(true, nil)
	if noted, _ := h.store.noted.look(digestOfSigners(signedClaim())); !noted {
		t.Error("it is not remembered that they are noted")
	}
	noteTwice(false, nil)
	if signers := must(h.store.signers(ctx, "@alice:test", "k", "e")); len(signers) != 1 {
		t.Errorf("noted are %v", signers)
	}
}

func TestSignersAreNotedAgainAfterAPartWasRolledBack(t *testing.T) {
	h := newTrustWorld(t).hook
	err := h.store.write(t.Context(), func(ctx context.Context) error {
		if _, err := h.store.Exec(ctx, "SAVEPOINT one"); err != nil {
			return err
		}
		if _, err := h.noteSigners(ctx, signedClaim()); err != nil {
			return err
		}
		if _, err := h.store.Exec(ctx, "ROLLBACK TO SAVEPOINT one"); err != nil {
			return err
		}
		h.forgetTransaction()
		return h.mergeClaim(ctx, signedClaim())
	})
	if err != nil {
		t.Error(err)
	}
}

// An operator may put an older copy of the database in the place of ours.
func TestWhatIsRememberedAsNotedAndIsNotThereIsNotedAgain(t *testing.T) {
	h, ctx := newTrustWorld(t).hook, t.Context()
	h.store.noted.keep(digestOfSigners(signedClaim()), true)
	h.uow.stage(func(ctx context.Context) error { return h.mergeClaim(ctx, signedClaim()) })
	if err := h.uow.flush(ctx); err == nil {
		t.Error("a claim of a device that is not there was stored")
	}
	if err := h.uow.flush(ctx); err != nil {
		t.Fatal(err)
	}
	if claims := must(h.store.claims(ctx, "s")); len(claims) != 1 {
		t.Errorf("%d claims", len(claims))
	}
}

// Whatever is noted of a claim is part of what tells claims apart.
func TestDigestOfSignersTellsThemApart(t *testing.T) {
	base := func() *SenderData {
		return &SenderData{Sender: "@a:test", SenderKey: "k", SigningKey: "e", signers: []signer{{"S", []byte("o")}}}
	}
	seen := map[[32]byte]string{digestOfSigners(base()): "base"}
	for name, change := range map[string]func(claim *SenderData){
		"user": func(claim *SenderData) { claim.Sender = "@b:test" }, "sender key": func(claim *SenderData) { claim.SenderKey = "l" },
		"signing key": func(claim *SenderData) { claim.SigningKey = "f" }, "none": func(claim *SenderData) { claim.signers = nil },
		"signer": func(claim *SenderData) { claim.signers[0].key = "T" }, "object": func(claim *SenderData) { claim.signers[0].object = []byte("p") },
		"two":     func(claim *SenderData) { claim.signers = append(claim.signers, signer{"S", []byte("o")}) },
		"shifted": func(claim *SenderData) { claim.SenderKey, claim.SigningKey = "ke", "" },
	} {
		claim := base()
		change(claim)
		digest := digestOfSigners(claim)
		if other, taken := seen[digest]; taken {
			t.Errorf("%s and %s have the same digest", name, other)
		}
		seen[digest] = name
	}
}

func TestStatementsAreKeptPrepared(t *testing.T) {
	for uri, want := range map[string]string{
		"file:x.db": "file:x.db?_stmt_cache_size=256", "x.db?_txlock=immediate": "x.db?_txlock=immediate&_stmt_cache_size=256",
		"x.db?_stmt_cache_size=0": "x.db?_stmt_cache_size=0",
	} {
		if got := withStatementCache(uri); got != want {
			t.Errorf("%s: %s", uri, got)
		}
	}
}

// absentWorld is a hook, and what it has looked up of a session of which nothing is stored.
func absentWorld(t *testing.T) (w *trustWorld, s *megolm, key, later *olmMessage, r *receiving) {
	t.Helper()
	w = newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s = newMegolm(trustRoom)
	message := func(content object) *olmMessage {
		olmEvent := arriving(t, alice, s)
		olmEvent.Content.VeryRaw = rawJSON(content)
		m := &olmMessage{arrivedKey: arrivedKey{olmEvent: olmEvent}}
		if m.read(); m.fault != nil {
			t.Fatal(m.fault)
		}
		return m
	}
	key, later = message(s.roomKey()), message(s.later())
	r = newReceiving(w.hook)
	return w, s, key, later, r
}

func (r *receiving) mustLookUp(t *testing.T, keys ...*olmMessage) {
	t.Helper()
	var arrived []*arrivedKey
	for _, key := range keys {
		arrived = append(arrived, &key.arrivedKey)
	}
	if err := r.lookUpSessions(t.Context(), arrived...); err != nil {
		t.Fatal(err)
	}
}

func TestSessionIsAbsentUntilItIsStored(t *testing.T) {
	store := map[string]func(w *trustWorld, r *receiving, session *crypto.InboundGroupSession) error{
		"by the receiver": func(w *trustWorld, r *receiving, session *crypto.InboundGroupSession) error {
			return w.hook.uow.PutGroupSession(r.context(w.ctx), session)
		},
		"and is durable": func(w *trustWorld, r *receiving, session *crypto.InboundGroupSession) error {
			return errors.Join(w.hook.uow.PutGroupSession(r.context(w.ctx), session), w.hook.uow.flush(w.ctx))
		},
		"by an import": func(w *trustWorld, _ *receiving, session *crypto.InboundGroupSession) error {
			session.KeySource = id.KeySourceImport
			return w.hook.uow.PutGroupSession(w.ctx, session)
		},
	}
	for name, put := range store {
		t.Run(name, func(t *testing.T) {
			w, s, key, later, r := absentWorld(t)
			r.mustLookUp(t, key)
			ctx := r.context(w.ctx)
			if stored := must(w.hook.uow.GetGroupSession(ctx, trustRoom, s.id())); stored != nil || !r.isAbsent(s.id()) {
				t.Error("a session is there that nobody has stored")
			}
			if err := put(w, r, key.arrivedKey.session); err != nil {
				t.Fatal(err)
			}
			stored := must(w.hook.uow.GetGroupSession(ctx, trustRoom, s.id()))
			if stored == nil || r.isAbsent(s.id()) {
				t.Fatal("the session is not seen")
			}
			// Of a worse key nothing is taken.
			if err := w.hook.storeDirect(ctx, later.arrivedKey.session, must(w.hook.holderOf(ctx, s.id()))); err != nil {
				t.Fatal(err)
			}
			stored = must(w.hook.uow.GetGroupSession(ctx, trustRoom, s.id()))
			if first := stored.Internal.FirstKnownIndex(); first != 0 {
				t.Errorf("the key that is stored begins at %d", first)
			}
			r.mustLookUp(t, key)
			if r.isAbsent(s.id()) {
				t.Error("a session that is stored or staged is taken for absent")
			}
		})
	}
}

func TestNothingIsTakenForAbsentWhileOthersStore(t *testing.T) {
	w, s, key, _, r := absentWorld(t)
	w.hook.uow.direct.begun.Add(1)
	r.mustLookUp(t, key)
	if r.isAbsent(s.id()) {
		t.Error("somebody who was about to store something is not thought of")
	}
	w.hook.uow.direct.ended.Add(1)
	r.mustLookUp(t, key)
	if !r.isAbsent(s.id()) {
		t.Error("it is not known that the session is absent")
	}
}

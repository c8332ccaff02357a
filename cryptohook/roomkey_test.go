package cryptohook

import (
	"slices"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/crypto/goolm/session"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// twoPeople is a world with alice and mallory in the room, each with one published device, both known.
func twoPeople(t *testing.T, change ...func(*Options)) (w *trustWorld, alice, mallory *actorDevice) {
	t.Helper()
	w = newTrustWorld(t, change...)
	alice, mallory = newActor("@alice:test").addDevice("ALICE"), newActor("@mallory:test").addDevice("MALLORY")
	w.know(alice.owner, mallory.owner)
	return w, alice, mallory
}

func TestRoomKeyOfAKnownSenderIsDerivedAtOnce(t *testing.T) {
	w, alice, _ := twoPeople(t)
	queries := w.server.count("keys/query")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	row := w.row(s, alice)
	if row.State != StateSenderUnverified || row.Sender != "@alice:test" || row.DeviceID != "ALICE" || row.MasterKey != alice.owner.masterKey() {
		t.Errorf("stored %+v", row)
	}
	if row.SigningKey != alice.signingKey() || row.RoomID != trustRoom || row.Source != SourceDirect || row.Legacy || row.DeviceKeys != nil || !row.NextRetry.IsZero() {
		t.Errorf("stored %+v", row)
	}
	if w.server.count("keys/query") != queries {
		t.Error("the fast lane has asked the server")
	}
	stored := w.storedKey(s, trustRoom)
	if stored == nil || stored.SourceUser != "@alice:test" || stored.KeySource != id.KeySourceDirect {
		t.Errorf("stored key %+v", stored)
	}
	if w.hook.sessions.TryLock(s.id()) == nil {
		t.Error("the session is still locked")
	}
}

func TestRoomKeyOfAStrangerIsLookedUpAndTheVerdictWaits(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	s := newMegolm(trustRoom)
	said := w.say(alice, s, "hello")
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}, timeline: []object{said}})
	row := w.row(s, alice)
	if row.State != StateUnknownDevice || row.Legacy || row.RetryCount != 0 || !row.NextRetry.Equal(w.clock.Now()) {
		t.Errorf("step C stored %+v", row)
	}
	w.handle()
	if w.saw(said["event_id"]) {
		t.Error("the verdict did not wait for its own sender's keys")
	}
	w.resolve()
	w.wantState(s, alice, StateSenderUnverified)
	w.handle()
	wantCode(t, w.sawOne("$event1"), CodeUnverifiedIdentity)
}

func TestEmbeddedKeysWaitForTheIdentityOnly(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	alice.unpublished = true // and still the proof is in the message
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	row := w.row(s, alice)
	if row.State != StateDeviceInfo || row.DeviceID != "ALICE" || row.RetryCount != 0 || !row.NextRetry.Equal(w.clock.Now()) {
		t.Errorf("step F stored %+v", row)
	}
	w.resolve()
	row = w.row(s, alice)
	if row.State != StateSenderUnverified || row.DeviceKeys != nil || !row.NextRetry.IsZero() {
		t.Errorf("step J stored %+v", row)
	}
}

// Two devices claim a session: whoever comes first, both claims stay, the key is not overwritten, and messages say so.
func TestTwoDevicesClaimASession(t *testing.T) {
	for _, tc := range []struct {
		name                         string
		attackerFirst, oneBatch, cut bool
	}{
		{name: "the owner first, in one batch", oneBatch: true},
		{name: "the owner first"},
		{name: "the owner first, a restart between", cut: true},
		{name: "the attacker first, in one batch", attackerFirst: true, oneBatch: true},
		{name: "the attacker first", attackerFirst: true},
		{name: "the attacker first, a restart between", attackerFirst: true, cut: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, alice, mallory := twoPeople(t)
			s := newMegolm(trustRoom)
			first, second := alice, mallory
			if tc.attackerFirst {
				first, second = mallory, alice
			}
			one, two := w.share(first, s), w.share(second, s)
			if tc.oneBatch {
				w.sync(syncPart{toDevice: []object{one, two}})
			} else {
				w.sync(syncPart{toDevice: []object{one}})
				if tc.cut {
					w.restart()
				}
				w.clock.advance(time.Second)
				w.sync(syncPart{toDevice: []object{two}})
			}
			w.resolve()
			if claims := w.claims(s); len(claims) != 2 {
				t.Fatalf("%d claims are kept", len(claims))
			}
			if stored := w.storedKey(s, trustRoom); stored == nil || stored.SenderKey != first.senderKey() {
				t.Errorf("the key was overwritten: %+v", stored)
			}
			seen := w.judgeNow(w.say(alice, s, "hello"))
			wantCode(t, seen, CodeSessionConflict)
			if seen.body != "hello" {
				t.Errorf("read %q: something is lost", seen.body)
			}
			var claimants []id.UserID
			for _, claimant := range seen.verdict.Claimants {
				claimants = append(claimants, claimant.UserID)
			}
			slices.Sort(claimants)
			if !slices.Equal(claimants, []id.UserID{"@alice:test", "@mallory:test"}) {
				t.Errorf("claimants %v", claimants)
			}
			w.restart()
			again := w.judgeNow(w.say(alice, s, "again"))
			wantCode(t, again, CodeSessionConflict)
		})
	}
}

// mautrix's store is keyed by the session ID alone: whoever claims a session for another room must not hide its messages.
func TestClaimForAnotherRoomHidesNothing(t *testing.T) {
	for _, attackerFirst := range []bool{false, true} {
		for _, oneBatch := range []bool{false, true} {
			t.Run(map[bool]string{false: "the owner first", true: "the attacker first"}[attackerFirst]+map[bool]string{false: "", true: ", in one batch"}[oneBatch], func(t *testing.T) {
				w, alice, mallory := twoPeople(t)
				s := newMegolm(trustRoom)
				events := []object{w.share(alice, s), w.olmEvent(mallory, "m.room_key", s.forRoom("!other:test"))}
				if attackerFirst {
					slices.Reverse(events)
				}
				if oneBatch {
					w.sync(syncPart{toDevice: events})
				} else {
					w.sync(syncPart{toDevice: events[:1]})
					w.sync(syncPart{toDevice: events[1:]})
				}
				w.resolve()
				if claims := w.claims(s); len(claims) != 2 {
					t.Errorf("%d claims are kept", len(claims))
				}
				said := w.say(alice, s, "hello")
				w.sync(syncPart{timeline: []object{said}})
				w.handle()
				w.clock.advance(time.Hour)
				w.handle()
				seen := w.sawOne(id.EventID(said["event_id"].(string)))
				wantCode(t, seen, CodeSessionConflict)
				if seen.body != "hello" {
					t.Errorf("read %q: the message is hidden (%s)", seen.body, seen.verdict.Reason)
				}
			})
		}
	}
}

// The attacker has the key from a later message on only, and claims the session with it first.
func TestClaimWithALaterRatchetHidesNothing(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := newMegolm(trustRoom)
	said := w.say(alice, s, "before")
	w.sync(syncPart{toDevice: []object{w.olmEvent(mallory, "m.room_key", s.later())}})
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.sync(syncPart{timeline: []object{said}})
	w.handle()
	w.clock.advance(time.Hour)
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeSessionConflict)
	if seen.body != "before" {
		t.Errorf("read %q: the message is hidden (%s)", seen.body, seen.verdict.Reason)
	}
}

// The attacker claims the session first, with a forged signature that is found out later: the owner's messages stay readable.
func TestRejectingAClaimKeepsTheOthersMessages(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	mallory := newActor("@mallory:test").addDevice("MALLORY")
	w.know(alice.owner)
	w.server.add(mallory.owner).hidden = true
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(mallory, s, embedding(mallory.forgedKeys()))}})
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	mallory.owner.hidden = false
	w.know(mallory.owner)
	w.wantState(s, mallory, StateRejected)
	said := w.say(alice, s, "hello")
	w.sync(syncPart{timeline: []object{said}})
	w.handle()
	w.clock.advance(time.Hour)
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnverifiedIdentity)
	if seen.body != "hello" {
		t.Errorf("read %q: the forger's rejection hides the owner's message (%s)", seen.body, seen.verdict.Reason)
	}
}

// Everybody in the room has the key of what we send, and could claim it as theirs.
func TestOurOwnSessionCannotBeClaimed(t *testing.T) {
	w, _, mallory := twoPeople(t)
	own, content := ownMessage(t, w)
	w.sync(syncPart{toDevice: []object{w.olmEvent(mallory, "m.room_key", own)}})
	seen := w.judgeNow(w.roomEvent("@mallory:test", "m.room.encrypted", content))
	if seen.verdict.Code != CodeMismatchedSender && seen.verdict.Code != CodeSessionConflict {
		t.Errorf("our own words, sent by mallory, are %s", seen.verdict.Code)
	}
}

func TestOurOwnMessageSentByAnotherIsAMismatch(t *testing.T) {
	w, _, _ := twoPeople(t)
	_, content := ownMessage(t, w)
	seen := w.judgeNow(w.roomEvent("@mallory:test", "m.room.encrypted", content))
	wantCode(t, seen, CodeMismatchedSender)
	if seen.body != "" {
		t.Errorf("handed on %q", seen.body)
	}
}

// ownMessage makes a session of the bot's own, and gives its m.room_key and a message sent with it.
func ownMessage(t *testing.T, w *trustWorld) (roomKey object, content object) {
	t.Helper()
	outbound := must(crypto.NewOutboundGroupSession(trustRoom, nil, nil))
	key := outbound.Internal.Key()
	account := w.hook.mach.GetAccount()
	inbound := must(crypto.NewInboundGroupSession(account.IdentityKey(), account.SigningKey(), trustRoom, key, 0, 0, nil, false))
	if err := w.hook.mach.StoreGroupSession(w.ctx, inbound); err != nil {
		t.Fatal(err)
	}
	own := &megolm{outbound: outbound.Internal, roomID: trustRoom, key: key}
	return own.roomKey(), own.message("what the bot says")
}

// A session that was stored before the hook is legacy. Its owner's messages must not be hidden by whoever claims it.
func TestLegacySessionCannotBeTakenOver(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := newMegolm(trustRoom)
	inbound := must(crypto.NewInboundGroupSession(alice.senderKey(), alice.signingKey(), trustRoom, s.key, 0, 0, nil, false))
	if err := w.hook.uow.SQLCryptoStore.PutGroupSession(w.ctx, inbound); err != nil {
		t.Fatal(err)
	}
	before := w.judgeNow(w.say(alice, s, "before"))
	wantCode(t, before, CodeAuthenticityNotGuaranteed)
	if !before.verdict.Legacy {
		t.Error("it is not called legacy")
	}
	replayed := w.say(alice, s, "alice's words")
	w.sync(syncPart{toDevice: []object{w.share(mallory, s)}})
	stolen := w.judgeNow(w.copyOf(replayed, "@mallory:test"))
	if stolen.verdict.Code == CodeUnverifiedIdentity || stolen.verdict.Code == CodeVerified {
		t.Errorf("alice's words are %s by mallory", stolen.verdict.Code)
	}
	after := w.judgeNow(w.say(alice, s, "after"))
	if after.verdict.Code == CodeMismatchedSender || after.body != "after" {
		t.Errorf("alice's own message is %s, read %q", after.verdict.Code, after.body)
	}
}

func TestRoomKeysThatAreNotValidAreSkipped(t *testing.T) {
	other := newMegolm(trustRoom)
	for name, change := range map[string]func(content object){
		"session ID of another session": func(c object) { c["session_id"] = other.id().String() },
		"no session ID":                 func(c object) { delete(c, "session_id") },
		"no session key":                func(c object) { delete(c, "session_key") },
		"session key of no session":     func(c object) { c["session_key"] = strings.Repeat("A", 306) },
		"session key that is no string": func(c object) { c["session_key"] = 5 },
		"another algorithm":             func(c object) { c["algorithm"] = "m.megolm.v2" },
		"room ID that is no string":     func(c object) { c["room_id"] = object{} },
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			content := s.roomKey()
			change(content)
			good := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", content), w.share(alice, good)}})
			if claims := w.claims(s); len(claims) != 0 {
				t.Errorf("a claim is stored: %+v", claims[0])
			}
			if len(w.claims(other)) != 0 {
				t.Error("a claim on the other session is stored")
			}
			if w.storedKey(s, trustRoom) != nil {
				t.Error("the key is stored")
			}
			w.wantState(good, alice, StateSenderUnverified)
		})
	}
}

func TestKeyForAnotherRoomDoesNotMoveTheSession(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s), w.olmEvent(alice, "m.room_key", s.forRoom("!other:test"))}})
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", s.forRoom("!other:test"))}})
	if row := w.row(s, alice); row.RoomID != trustRoom {
		t.Errorf("the claim has moved to %s", row.RoomID)
	}
	seen := w.judgeNow(w.say(alice, s, "hello"))
	wantCode(t, seen, CodeUnverifiedIdentity)
	if seen.body != "hello" {
		t.Errorf("read %q", seen.body)
	}
}

func TestMessageInAnotherRoomThanItsSession(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	moved := w.say(alice, s, "said in the other room")
	w.sync(syncPart{room: "!other:test", timeline: []object{moved}})
	w.clock.advance(time.Hour)
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnableToDecrypt)
	if seen.body != "" {
		t.Errorf("read %q", seen.body)
	}
}

func TestForgedSignatureLeavesATombstoneAtOnce(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.forgedKeys()))}})
	row := w.row(s, alice)
	if row.State != StateRejected || row.Reason != reasonForgedSignature || row.DeviceKeys != nil || !row.NextRetry.IsZero() {
		t.Errorf("stored %+v", row)
	}
	if w.storedKey(s, trustRoom) != nil {
		t.Error("the key is there")
	}
	seen := w.judgeNow(w.say(alice, s, "forged"))
	wantCode(t, seen, CodeSessionRejected)
	if seen.body != "" || !seen.verdict.ContentWithheld {
		t.Errorf("handed on %q", seen.body)
	}
}

func TestForgedSignatureIsFoundOutWhenTheIdentityComes(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.forgedKeys()))}})
	w.wantState(s, alice, StateDeviceInfo)
	if w.storedKey(s, trustRoom) == nil {
		t.Fatal("the key is not there yet")
	}
	w.resolve()
	w.wantState(s, alice, StateRejected)
	if w.storedKey(s, trustRoom) != nil {
		t.Error("the key is still there")
	}
	wantCode(t, w.judgeNow(w.say(alice, s, "forged")), CodeSessionRejected)
}

// Only proof undoes a rejection: a copy of the key without any proof must not bring the key back.
func TestRejectedKeyDoesNotComeBackWithoutProof(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	alice.unpublished = true
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.forgedKeys()))}})
	w.wantState(s, alice, StateRejected)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.wantState(s, alice, StateRejected)
	if w.storedKey(s, trustRoom) != nil {
		t.Error("the rejected session has a key again")
	}
	wantCode(t, w.judgeNow(w.say(alice, s, "forged")), CodeSessionRejected)
}

func TestRejectedKeyDoesNotComeBackByAnImport(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.forgedKeys()))}})
	_ = importFromBackup(t, w, alice, exportOf(t, s.key, 0), s.id(), trustRoom)
	w.wantState(s, alice, StateRejected)
	if w.storedKey(s, trustRoom) != nil {
		t.Error("the rejected session has a key again")
	}
}

// When every claim is rejected, the key goes with the last.
func TestKeyGoesWithTheLastClaim(t *testing.T) {
	w := newTrustWorld(t)
	one, two := newActor("@one:test").addDevice("ONE"), newActor("@two:test").addDevice("TWO")
	w.server.add(one.owner).hidden, w.server.add(two.owner).hidden = true, true
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(one, s, embedding(one.forgedKeys()))}})
	w.sync(syncPart{toDevice: []object{w.share(two, s, embedding(two.forgedKeys()))}})
	one.owner.hidden = false
	w.know(one.owner)
	w.wantState(s, one, StateRejected)
	if w.storedKey(s, trustRoom) == nil {
		t.Error("the key is gone while somebody else claims it")
	}
	two.owner.hidden = false
	w.know(two.owner)
	w.wantState(s, two, StateRejected)
	if w.storedKey(s, trustRoom) != nil {
		t.Error("the key is still there")
	}
	wantCode(t, w.judgeNow(w.say(one, s, "forged")), CodeSessionRejected)
}

func TestProofUndoesARejection(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.forgedKeys()))}})
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.wantState(s, alice, StateSenderUnverified)
	seen := w.judgeNow(w.say(alice, s, "genuine"))
	wantCode(t, seen, CodeUnverifiedIdentity)
	if seen.body != "genuine" {
		t.Errorf("read %q", seen.body)
	}
}

func TestAForgedCopyInTheSameBatchTakesAnUnprovenKeyAway(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.selfSignedKeys())), w.share(alice, s, embedding(alice.forgedKeys()))}})
	// The published copy is signed, so that the first one is proven and stays.
	w.wantState(s, alice, StateSenderUnverified)
	if w.storedKey(s, trustRoom) == nil {
		t.Error("the proven key is gone")
	}
	bob := newActor("@bob:test").addDevice("BOB")
	bob.crossSigned = false
	w.know(bob.owner)
	s = newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(bob, s), w.share(bob, s, embedding(bob.forgedKeys()))}})
	// The first one's guard was held; what the second one brought waits for the resolver.
	w.resolve()
	w.wantState(s, bob, StateRejected)
	if w.storedKey(s, trustRoom) != nil {
		t.Error("the unproven key is still there")
	}
}

func TestRoomKeyFromADeletedDeviceIsUnknown(t *testing.T) {
	w, alice, _ := twoPeople(t)
	alice.unpublished = true
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.wantState(s, alice, StateUnknownDevice)
	w.resolve()
	w.wantState(s, alice, StateUnknownDevice)
	wantCode(t, w.judgeNow(w.say(alice, s, "from the grave")), CodeUnknownDevice)
}

func TestUnsignedDeviceOfAVerifiedUserIsUnsigned(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test")
	alice.verifiedBy = w.bot
	alice.addDevice("SIGNED")
	second := alice.addDevice("SECOND")
	second.crossSigned = false
	w.know(alice)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(second, s)}})
	seen := w.judgeNow(w.say(second, s, "hello"))
	wantCode(t, seen, CodeUnsignedDevice)
	if seen.verdict.DeviceID != "SECOND" {
		t.Errorf("device %s", seen.verdict.DeviceID)
	}
}

func TestLockTakenOnArrivalDropsNothing(t *testing.T) {
	for _, embedded := range []bool{true, false} {
		w := newTrustWorld(t)
		alice := newActor("@alice:test").addDevice("ALICE")
		s := newMegolm(trustRoom)
		guard := w.hook.sessions.TryLock(s.id())
		evt, want := w.share(alice, s), StateDeviceInfo
		if !embedded {
			evt, want = w.share(alice, s, withoutDeviceKeys), StateUnknownDevice
		}
		w.sync(syncPart{toDevice: []object{evt}})
		row := w.row(s, alice)
		if row.State != want || !row.NextRetry.Equal(w.clock.Now()) || row.RetryCount != 0 {
			t.Errorf("stored %+v", row)
		}
		if embedded && (row.DeviceID != "ALICE" || len(must(w.hook.store.signers(w.ctx, "@alice:test", alice.senderKey(), alice.signingKey()))) != 1) {
			t.Error("what the device keys say is lost")
		}
		if w.storedKey(s, trustRoom) == nil {
			t.Error("the room key is lost")
		}
		if worked, err := w.hook.resolver.pass(w.ctx); err != nil || worked {
			t.Errorf("the resolver has worked on a session that somebody else holds (%v)", err)
		}
		w.server.add(alice.owner)
		guard.Unlock()
		w.resolve()
		w.wantState(s, alice, StateSenderUnverified)
	}
}

// Whoever claims a session first, and has us wait for keys that never come, does not keep its owner from being proven.
func TestLockOfAnotherClaimantHoldsUpNoProof(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	eve := newActor("@eve:silent.test").addDevice("EVE")
	w.sync(syncPart{toDevice: []object{w.share(eve, s, withoutDeviceKeys)}})
	if guard := w.hook.sessions.TryLock(s.id()); guard != nil {
		t.Fatal("nobody waits for Eve's keys")
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.wantState(s, alice, StateSenderUnverified)
}

// sender_device_keys that are wrong in any of four ways: the whole event is refused (REFERENCE.md).
func TestWrongSenderDeviceKeysRejectTheEvent(t *testing.T) {
	for name, forge := range map[string]func(w *trustWorld, alice, mallory *actorDevice) object{
		"another user": func(_ *trustWorld, alice, mallory *actorDevice) object {
			keys := alice.selfSignedKeys()
			delete(keys, "signatures")
			keys["user_id"] = mallory.owner.userID.String()
			signInto(keys, mallory.owner.userID, "ALICE", alice.account)
			return keys
		},
		"another curve25519 key": func(_ *trustWorld, alice, mallory *actorDevice) object {
			keys := alice.selfSignedKeys()
			delete(keys, "signatures")
			keys["keys"].(object)["curve25519:ALICE"] = mallory.senderKey().String()
			signInto(keys, alice.owner.userID, "ALICE", alice.account)
			return keys
		},
		"another ed25519 key": func(_ *trustWorld, alice, mallory *actorDevice) object {
			keys := alice.selfSignedKeys()
			delete(keys, "signatures")
			keys["device_id"] = "NEW"
			keys["keys"] = object{"curve25519:NEW": alice.senderKey().String(), "ed25519:NEW": mallory.signingKey().String()}
			signInto(keys, alice.owner.userID, "NEW", mallory.account)
			return keys
		},
		"a broken signature": func(_ *trustWorld, alice, _ *actorDevice) object {
			keys := alice.keys()
			putSignature(keys, alice.owner.userID, "ALICE", forgedSignature())
			return keys
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newTrustWorld(t)
			alice, mallory := newActor("@alice:test").addDevice("ALICE"), newActor("@mallory:test").addDevice("MALLORY")
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(forge(w, alice, mallory)))}})
			if len(w.claims(s)) != 0 || w.storedKey(s, trustRoom) != nil {
				t.Error("the room key was accepted")
			}
		})
	}
}

// The checks of the Olm payload are mautrix's; that they hold on our way too is what counts.
func TestForgedOlmPayloadsBringNoRoomKey(t *testing.T) {
	for name, forge := range map[string]func(payload object){
		"another sender":           func(p object) { p["sender"] = "@bob:test" },
		"another recipient":        func(p object) { p["recipient"] = "@bob:test" },
		"another recipient's keys": func(p object) { p["recipient_keys"] = object{"ed25519": "x"} },
		"another ed25519 key":      func(p object) { p["keys"] = object{"ed25519": "x"} },
		"no ed25519 key": func(p object) {
			delete(p, "keys")
			delete(p, "sender_device_keys")
		},
		"a content that is no object": func(p object) { p["content"] = []any{} },
		"no content":                  func(p object) { delete(p, "content") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newTrustWorld(t)
			alice := newActor("@alice:test").addDevice("ALICE")
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s, forge)}})
			if len(w.claims(s)) != 0 || w.storedKey(s, trustRoom) != nil {
				t.Error("the room key was accepted")
			}
		})
	}
}

func TestRoomKeyInTheClearIsIgnored(t *testing.T) {
	w := newTrustWorld(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{{"type": "m.room_key", "sender": "@alice:test", "content": s.roomKey()}}})
	if len(w.claims(s)) != 0 || w.storedKey(s, trustRoom) != nil {
		t.Error("the room key was accepted")
	}
}

// DESIGN.md, section 5: the check of the recipient (user, device) is the hook's to do.
func TestToDeviceEventForAnotherDeviceIsIgnored(t *testing.T) {
	for name, to := range map[string]object{
		"another user":   {"to_user_id": "@other:test", "to_device_id": "BOTDEVICE"},
		"another device": {"to_user_id": "@bot:test", "to_device_id": "OTHER"},
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			evt := w.share(alice, s)
			for key, value := range to {
				evt[key] = value
			}
			w.sync(syncPart{toDevice: []object{evt}})
			if len(w.claims(s)) != 0 {
				t.Error("the room key was accepted")
			}
		})
	}
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	evt := w.share(alice, s)
	evt["to_user_id"], evt["to_device_id"] = "@bot:test", "BOTDEVICE"
	w.sync(syncPart{toDevice: []object{evt}})
	w.wantState(s, alice, StateSenderUnverified)
}

func TestABetterRatchetIsTakenAndTheTrustStays(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	early := w.say(alice, s, "early")
	late := w.olmEvent(alice, "m.room_key", s.later())
	w.sync(syncPart{toDevice: []object{late}})
	w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.selfSignedKeys()))}})
	w.wantState(s, alice, StateSenderUnverified)
	if stored := w.storedKey(s, trustRoom); stored == nil || stored.Internal.FirstKnownIndex() != 0 {
		t.Error("the better ratchet was not taken")
	}
	seen := w.judgeNow(early)
	wantCode(t, seen, CodeUnverifiedIdentity)
}

func TestAWorseRatchetIsNotTakenAndMoreTrustIs(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	alice.crossSigned = false
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	early := w.say(alice, s, "early")
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.wantState(s, alice, StateDeviceInfo)
	alice.crossSigned = true
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", s.later())}})
	w.wantState(s, alice, StateSenderUnverified)
	if stored := w.storedKey(s, trustRoom); stored == nil || stored.Internal.FirstKnownIndex() != 0 {
		t.Error("the worse ratchet was taken")
	}
	wantCode(t, w.judgeNow(early), CodeUnverifiedIdentity)
}

// importFromBackup imports a session as mautrix does it with what the server-side backup holds.
func importFromBackup(t *testing.T, w *trustWorld, from *actorDevice, exported []byte, sessionID id.SessionID, roomID id.RoomID) error {
	t.Helper()
	_, err := w.hook.mach.ImportRoomKeyFromBackup(w.ctx, "1", roomID, sessionID, &backup.MegolmSessionData{
		Algorithm: id.AlgorithmMegolmV1, SenderKey: from.senderKey(), SessionKey: string(exported),
		SenderClaimedKeys: backup.SenderClaimedKeys{Ed25519: from.signingKey()},
	})
	return err
}

func exportOf(t *testing.T, sessionKey string, index uint32) []byte {
	t.Helper()
	inbound := must(olm.NewInboundGroupSession([]byte(sessionKey)))
	return must(inbound.Export(index))
}

func TestImportedSessionGuaranteesNothing(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	if err := importFromBackup(t, w, alice, exportOf(t, s.key, 0), s.id(), trustRoom); err != nil {
		t.Fatal(err)
	}
	row := w.row(s, alice)
	if row.State != StateUnknownDevice || !row.Legacy || row.Source != SourceBackup || !row.NextRetry.IsZero() {
		t.Errorf("stored %+v", row)
	}
	seen := w.judgeNow(w.say(alice, s, "from the backup"))
	wantCode(t, seen, CodeAuthenticityNotGuaranteed)
	if seen.body != "from the backup" || !seen.verdict.Legacy {
		t.Errorf("read %q, legacy %v", seen.body, seen.verdict.Legacy)
	}
	// The reference's fault: the owner's device appears later, and the row turns into "not legacy, owner check failed".
	w.know(alice.owner)
	w.resolve()
	if row = w.row(s, alice); !row.Legacy || row.Reason != "" {
		t.Errorf("stored %+v", row)
	}
	// The key comes from the owner after all.
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	if row = w.row(s, alice); row.State != StateSenderUnverified || row.Legacy || row.Source != SourceDirect {
		t.Errorf("stored %+v", row)
	}
	wantCode(t, w.judgeNow(w.say(alice, s, "directly")), CodeUnverifiedIdentity)
}

func TestImportNeverReplacesADirectSession(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	_ = importFromBackup(t, w, alice, exportOf(t, s.key, 0), s.id(), trustRoom)
	if row := w.row(s, alice); row.State != StateSenderUnverified || row.Source != SourceDirect || row.Legacy {
		t.Errorf("stored %+v", row)
	}
	_ = importFromBackup(t, w, mallory, exportOf(t, s.key, 0), s.id(), "!other:test")
	if stored := w.storedKey(s, trustRoom); stored == nil || stored.SenderKey != alice.senderKey() {
		t.Error("an import for another room has taken the session's place")
	}
	_ = importFromBackup(t, w, alice, exportOf(t, s.key, 0), s.id(), "!other:test")
	if w.storedKey(s, trustRoom) == nil {
		t.Error("an import with the sender's own key, for another room, has taken the session's place")
	}
}

// "A better ratchet from the same sender key is merged": the backup knows the session from an earlier message on than we do.
func TestBackupCompletesADirectSession(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	early := w.say(alice, s, "early")
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", s.later())}})
	if err := importFromBackup(t, w, alice, exportOf(t, s.key, 0), s.id(), trustRoom); err != nil {
		t.Errorf("failed to import: %v", err)
	}
	if row := w.row(s, alice); row.State != StateSenderUnverified || row.Source != SourceDirect {
		t.Errorf("stored %+v", row)
	}
	w.sync(syncPart{timeline: []object{early}})
	w.clock.advance(time.Hour)
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnverifiedIdentity)
}

// An export is not signed: whoever writes into the backup may put any ratchet under a session's ID.
func TestUnconnectedRatchetFromTheBackupDoesNotReplaceADirectOne(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s, other := newMegolm(trustRoom), newMegolm(trustRoom)
	s.message("index 0 is used up")
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", s.later())}})
	_ = importFromBackup(t, w, alice, grafted(t, s, other), s.id(), trustRoom)
	seen := w.judgeNow(w.say(alice, s, "hello"))
	wantCode(t, seen, CodeUnverifiedIdentity)
	if seen.body != "hello" {
		t.Errorf("read %q: the backup hides the message", seen.body)
	}
}

// grafted is an export with one session's public key, hence its ID, and another one's ratchet.
func grafted(t *testing.T, identity, ratchet *megolm) []byte {
	t.Helper()
	own := must(session.NewMegolmInboundSession([]byte(identity.key)))
	graft := must(session.NewMegolmInboundSession([]byte(ratchet.key)))
	graft.SigningKey = own.SigningKey
	exported := must(graft.Export(0))
	if must(olm.InboundGroupSessionImport(exported)).ID() != identity.id() {
		t.Fatal("the graft has another session ID")
	}
	return exported
}

func TestForwardedKeyIsIgnored(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := newMegolm(trustRoom)
	for _, sessionKey := range []string{string(exportOf(t, s.key, 0)), s.key} {
		forwarded := object{
			"algorithm": string(id.AlgorithmMegolmV1), "room_id": trustRoom.String(), "session_id": s.id().String(),
			"session_key": sessionKey, "sender_key": alice.senderKey().String(),
			"sender_claimed_ed25519_key": alice.signingKey().String(), "forwarding_curve25519_key_chain": []any{},
		}
		w.sync(syncPart{toDevice: []object{w.olmEvent(mallory, "m.forwarded_room_key", forwarded)}})
	}
	if len(w.claims(s)) != 0 || w.storedKey(s, trustRoom) != nil {
		t.Error("a forwarded key that nobody asked for was accepted")
	}
}

func TestBypassingTheHookIsAnError(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	inbound := must(crypto.NewInboundGroupSession(alice.senderKey(), alice.signingKey(), trustRoom, s.key, 0, 0, nil, false))
	if err := w.hook.mach.StoreGroupSession(w.ctx, inbound); err == nil || !strings.Contains(err.Error(), ErrHookBypassed.Error()) {
		t.Errorf("error %v", err)
	}
	// Stock handling of a room key is such a way.
	var evt event.Event
	stock := w.share(alice, s)
	if err := evt.UnmarshalJSON(rawJSON(stock)); err != nil {
		t.Fatal(err)
	}
	evt.Type.Class = event.ToDeviceEventType
	if err := evt.Content.ParseRaw(evt.Type); err != nil {
		t.Fatal(err)
	}
	w.hook.mach.HandleToDeviceEvent(w.ctx, &evt)
	if w.storedKey(s, trustRoom) != nil || !strings.Contains(w.log.String(), ErrHookBypassed.Error()) {
		t.Error("a room key came past the hook, silently")
	}
}

func TestRotationSettingsAreMautrixs(t *testing.T) {
	w, alice, _ := twoPeople(t)
	for _, tc := range []struct {
		name     string
		room     object
		key      object
		age      time.Duration
		messages int
	}{
		{"the room says nothing", object{}, object{}, 7 * 24 * time.Hour, 100},
		{"the room says", object{"rotation_period_ms": 3600_000, "rotation_period_msgs": 7}, object{}, time.Hour, 7},
		{"the key says", object{"rotation_period_ms": 3600_000}, object{"com.beeper.max_age_ms": 1000, "com.beeper.max_messages": 3}, time.Second, 3},
	} {
		tc.room["algorithm"] = string(id.AlgorithmMegolmV1)
		w.sync(syncPart{state: []object{{"type": "m.room.encryption", "state_key": "", "event_id": "$e", "sender": "@alice:test", "content": tc.room}}})
		s := newMegolm(trustRoom)
		content := s.roomKey()
		for key, value := range tc.key {
			content[key] = value
		}
		w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", content)}})
		stored := w.storedKey(s, trustRoom)
		if stored == nil || stored.MaxAge != tc.age.Milliseconds() || stored.MaxMessages != tc.messages {
			t.Errorf("%s: stored %+v", tc.name, stored)
		}
	}
}

func TestPreviousKeysAreDeletedOnReceiveIfAskedFor(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	w.hook.mach.DeletePreviousKeysOnReceive = true
	first, second, others := newMegolm(trustRoom), newMegolm(trustRoom), newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, first), w.share(mallory, others)}})
	w.sync(syncPart{toDevice: []object{w.share(alice, second)}})
	if w.storedKey(first, trustRoom) != nil {
		t.Error("the former key is still there")
	}
	if w.storedKey(second, trustRoom) == nil || w.storedKey(others, trustRoom) == nil {
		t.Error("another key is gone")
	}
}

// The same the other way round: what the backup said first must not stay when the owner's own key comes.
func TestUnconnectedRatchetFromTheBackupMakesRoomForADirectOne(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s, other := newMegolm(trustRoom), newMegolm(trustRoom)
	if err := importFromBackup(t, w, alice, grafted(t, s, other), s.id(), trustRoom); err != nil {
		t.Fatal(err)
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	seen := w.judgeNow(w.say(alice, s, "hello"))
	wantCode(t, seen, CodeUnverifiedIdentity)
	if seen.body != "hello" {
		t.Errorf("read %q: the backup hides the message (%s)", seen.body, seen.verdict.Reason)
	}
}

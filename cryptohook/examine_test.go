package cryptohook

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// fromServer gives an event of the room as GET /event does.
func fromServer(evt object) *event.Event {
	shown := object{"room_id": trustRoom.String()}
	for key, value := range evt {
		shown[key] = value
	}
	var parsed event.Event
	if err := json.Unmarshal(rawJSON(shown), &parsed); err != nil {
		panic(err)
	}
	return &parsed
}

func (w *trustWorld) examine(evt object) *Examination {
	w.t.Helper()
	before := fromServer(evt)
	shown := fromServer(evt)
	found := must(w.hook.Examine(w.ctx, shown))
	if !reflect.DeepEqual(shown, before) {
		w.t.Errorf("Examine has changed the event: %+v", shown)
	}
	return found
}

// stepWords writes steps as one text.
func stepWords(steps []Step) string {
	var words []string
	for _, step := range steps {
		words = append(words, step.Letter+" "+string(step.Outcome))
	}
	return strings.Join(words, ", ")
}

// agree sees that an examination of an event says what its handler was told.
func (w *trustWorld) agree(when string, evt object, told Verdict) *Examination {
	w.t.Helper()
	found := w.examine(evt)
	want := told
	want.Late = false
	if !reflect.DeepEqual(found.Verdict, want) {
		w.t.Errorf("%s: Examine says %+v, and the handler was told %+v", when, found.Verdict, want)
	}
	wantShown := told.Code != CodeUnableToDecrypt && told.Code != CodeMismatchedSender && !told.ContentWithheld && evt["type"] == "m.room.encrypted"
	if shown := found.Event.Mautrix.WasEncrypted; shown != wantShown {
		w.t.Errorf("%s: shown decrypted: %v", when, shown)
	}
	return found
}

// examineAsWell is for the stories of the truth: at each point of theirs Examine says what a handler is told, and what can be proven is
// accepted as that.
func (w *truthWorld) examineAsWell(when string, evt object, told Verdict) {
	w.t.Helper()
	found := w.agree(when, evt, told)
	if len(found.Claims) != 1 || found.Claims[0].State != told.State {
		w.t.Errorf("%s: claims %+v", when, found.Claims)
		return
	}
	steps := stepWords(found.Claims[0].Steps)
	ends := map[State][]string{
		StateUnknownDevice: {"C waits", "C given_up"}, StateDeviceInfo: {"D not_signed", "F waits", "F given_up", "G signed_by_other"},
		StateSenderVerified: {"J verified"}, StateSenderUnverified: {"J unverified"}, StateVerificationViolation: {"J violation"},
	}[told.State]
	if !slices.ContainsFunc(ends, func(end string) bool { return strings.HasSuffix(steps, end) }) {
		w.t.Errorf("%s: %s by the steps %s", when, told.State, steps)
	}
	w.proveAsWell(when, evt, told)
}

// TestExamineAgreesWithTheInbox is about what the stories of the truth do not tell.
func TestExamineAgreesWithTheInbox(t *testing.T) {
	seen := make(map[Code]bool)
	for name, scene := range map[string]func(t *testing.T) (w *trustWorld, evt object, steps string){
		"unverified": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			return w, w.say(alice, s, "hello"), "A embedded_keys, D signed, E identity_known, G signed_by_owner, H signature_valid, J unverified"
		},
		"without embedded keys": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
			return w, w.say(alice, s, "hello"), "A no_embedded_keys, B device_found, D signed, E identity_known, G signed_by_owner, H signature_valid, J unverified"
		},
		"verified": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			if err := w.hook.Verify(w.ctx, alice.owner.userID, alice.owner.masterKey()); err != nil {
				t.Fatal(err)
			}
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			return w, w.say(alice, s, "hello"), "A embedded_keys, D signed, E identity_known, G signed_by_owner, H signature_valid, J verified"
		},
		"reset": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			alice.owner.reset()
			w.know(alice.owner)
			return w, w.say(alice, s, "hello"), "A embedded_keys, D signed, E identity_known, G signed_by_earlier_identity, H signature_valid, J unverified"
		},
		"violation": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			if err := w.hook.Verify(w.ctx, alice.owner.userID, alice.owner.masterKey()); err != nil {
				t.Fatal(err)
			}
			alice.owner.reset()
			w.know(alice.owner)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			return w, w.say(alice, s, "hello"), "A embedded_keys, D signed, E identity_known, G signed_by_owner, H signature_valid, J violation"
		},
		"unsigned": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			other := alice.owner.addDevice("OTHER")
			other.crossSigned = false
			w.know(alice.owner)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(other, s)}})
			return w, w.say(other, s, "hello"), "A embedded_keys, D not_signed"
		},
		"no identity": func(t *testing.T) (*trustWorld, object, string) {
			w := newTrustWorld(t)
			alice := newActor("@alice:test").addDevice("ALICE")
			alice.owner.hidden = true
			w.know(alice.owner)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			w.resolve()
			return w, w.say(alice, s, "hello"), "A embedded_keys, D signed, E no_identity, F waits"
		},
		"unknown": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			ghost := alice.owner.addDevice("GHOST")
			ghost.unpublished = true
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(ghost, s, withoutDeviceKeys)}})
			w.resolve()
			return w, w.say(ghost, s, "hello"), "A no_embedded_keys, B device_not_found, C waits"
		},
		"imported": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			if err := importFromBackup(t, w, alice, exportOf(t, s.key, 0), s.id(), trustRoom); err != nil {
				t.Fatal(err)
			}
			return w, w.say(alice, s, "hello"), ""
		},
		"sent on": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, mallory := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			return w, w.copyOf(w.say(alice, s, "hello"), mallory.owner.userID), "A embedded_keys, D signed, E identity_known, G signed_by_owner, H signature_valid, J unverified"
		},
		"replayed": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			original := w.say(alice, s, "hello")
			w.judgeNow(original)
			return w, w.copyOf(original, alice.owner.userID), "A embedded_keys, D signed, E identity_known, G signed_by_owner, H signature_valid, J unverified"
		},
		"conflict": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, mallory := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			w.clock.advance(1_000_000)
			w.sync(syncPart{toDevice: []object{w.share(mallory, s)}})
			return w, w.say(alice, s, "hello"), "A embedded_keys, D signed, E identity_known, G signed_by_owner, H signature_valid, J unverified"
		},
		"rejected": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(alice.forgedKeys()))}})
			return w, w.say(alice, s, "hello"), "A embedded_keys, D signed, E identity_known, G signed_by_owner, H signature_forged"
		},
		"in the clear": func(t *testing.T) (*trustWorld, object, string) {
			w, _, _ := twoPeople(t)
			return w, w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "hello"}), ""
		},
		"malformed": func(t *testing.T) (*trustWorld, object, string) {
			w, _, _ := twoPeople(t)
			return w, w.roomEvent("@alice:test", "m.room.encrypted", object{"algorithm": 5}), ""
		},
		"redacted": func(t *testing.T) (*trustWorld, object, string) {
			w, _, _ := twoPeople(t)
			return w, w.roomEvent("@alice:test", "m.room.encrypted", object{}), ""
		},
		"without a key": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			return w, w.say(alice, newMegolm(trustRoom), "hello"), ""
		},
		"in another room": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t)
			s := newMegolm("!other:test")
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			return w, w.say(alice, s, "hello"), "A embedded_keys, D signed, E identity_known, G signed_by_owner, H signature_valid, J unverified"
		},
		"below the requirement": func(t *testing.T) (*trustWorld, object, string) {
			w, alice, _ := twoPeople(t, func(o *Options) { o.Requirement = RequireCrossSigned })
			other := alice.owner.addDevice("OTHER")
			other.crossSigned = false
			w.know(alice.owner)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(other, s)}})
			return w, w.say(other, s, "hello"), "A embedded_keys, D not_signed"
		},
		"in the clear, below the requirement": func(t *testing.T) (*trustWorld, object, string) {
			w, _, _ := twoPeople(t, func(o *Options) { o.Requirement = RequireCrossSigned })
			return w, w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "obey"}), ""
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, evt, steps := scene(t)
			before := w.agreeBefore(evt)
			w.sync(syncPart{timeline: []object{evt}})
			w.handle()
			if !w.saw(evt["event_id"]) {
				w.clock.advance(w.hook.options.KeyWait + longestIdentityWait)
				w.handle()
			}
			told := w.sawOne(id.EventID(evt["event_id"].(string))).verdict
			found := w.agree(name, evt, told)
			seen[told.Code] = true
			if before.Code != told.Code || before.Reason != told.Reason {
				t.Errorf("before it came, it was %s (%s), and then %s (%s)", before.Code, before.Reason, told.Code, told.Reason)
			}
			var got string
			if len(found.Claims) > 0 {
				got = stepWords(found.Claims[0].Steps)
			}
			if got != steps {
				t.Errorf("steps %s\nwant  %s", got, steps)
			}
		})
	}
	seen[CodeNotEncrypted] = true // TestPlaintextIsExaminedAsItCame
	for code := range shields {
		if !seen[code] {
			t.Errorf("no scene is %s", code)
		}
	}
}

// agreeBefore examines an event that has not come yet, twice: that must use up nothing.
func (w *trustWorld) agreeBefore(evt object) Verdict {
	w.t.Helper()
	first := w.examine(evt).Verdict
	if again := w.examine(evt).Verdict; !reflect.DeepEqual(first, again) {
		w.t.Errorf("examined again, it is %+v instead of %+v", again, first)
	}
	return first
}

func TestPlaintextIsExaminedAsItCame(t *testing.T) {
	w, _, _ := twoPeople(t)
	const open = id.RoomID("!open:test")
	evt := w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "hello"})
	w.sync(syncPart{room: open, timeline: []object{evt}})
	w.handle()
	evt["room_id"] = open.String()
	w.agree("a room that is not encrypted", evt, w.sawOne("$event1").verdict)
	// It was no lie then, and is none now.
	w.sync(syncPart{room: open, state: []object{{
		"type": "m.room.encryption", "state_key": "", "event_id": "$encryption2", "sender": "@alice:test", "content": object{"algorithm": string(id.AlgorithmMegolmV1)},
	}}})
	w.agree("a room that was not encrypted", evt, w.sawOne("$event1").verdict)
	if code := w.examine(evt).Verdict.Code; code != CodeNotEncrypted {
		t.Errorf("it is %s", code)
	}
}

func TestExamineWantsAnEventAndItsRoom(t *testing.T) {
	w, _, _ := twoPeople(t)
	if _, err := w.hook.Examine(w.ctx, &event.Event{ID: "$x"}); err == nil {
		t.Error("an event of no room was judged")
	}
}

func TestExamineStoresNothing(t *testing.T) {
	sqliteOnly(t)
	w, alice, mallory := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	original := w.say(alice, s, "hello")
	before := dump(w.db.RawDB)
	queries := w.server.count("keys/query")
	for _, evt := range []object{
		original, w.copyOf(original, mallory.owner.userID), w.say(alice, newMegolm(trustRoom), "no key"),
		w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "clear"}),
	} {
		w.examine(evt)
	}
	if after := dump(w.db.RawDB); !reflect.DeepEqual(before, after) {
		t.Error("the database has changed")
	}
	if w.server.count("keys/query") != queries {
		t.Error("the homeserver was asked")
	}
	if w.hook.search.length() != 0 {
		t.Error("a key is looked for")
	}
}

// What a verdict rests on is told: whose claim, by which keys, signed by whom, and who that is.
func TestExaminationTellsWhatItRestsOn(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(mallory, s, embedding(mallory.forgedKeys()))}})
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	found := w.examine(w.say(alice, s, "hello"))
	if len(found.Claims) != 2 || found.Claims[0].UserID != alice.owner.userID || found.Claims[1].State != StateRejected {
		t.Fatalf("claims %+v", found.Claims)
	}
	claim := found.Claims[0]
	if claim.DeviceID != "ALICE" || claim.SenderKey != alice.senderKey() || claim.SigningKey != alice.signingKey() || claim.MasterKey != alice.owner.masterKey() ||
		claim.Source != SourceDirect || claim.Legacy || !claim.ReceivedAt.Equal(w.clock.Now()) {
		t.Errorf("claim %+v", claim)
	}
	if !slices.Equal(claim.Signers, []id.Ed25519{alice.owner.selfSigningKey()}) || !signedBy(claim.DeviceKeys, claim.UserID, alice.owner.selfSigningKey()) {
		t.Errorf("signed by %v: %s", claim.Signers, claim.DeviceKeys)
	}
	if found.Identity == nil || found.Identity.MasterKey != alice.owner.masterKey() {
		t.Errorf("identity %+v", found.Identity)
	}
	if body := found.Event.Content.AsMessage().Body; body != "hello" {
		t.Errorf("it says %q", body)
	}
}

// The keys of a device that was logged out before anybody could ask for it are what came with its message.
func TestKeysOfADeviceThatIsGoneAreKept(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	alice.unpublished = true
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.wantState(s, alice, StateSenderUnverified)
	found := w.examine(w.say(alice, s, "hello"))
	if !signedBy(found.Claims[0].DeviceKeys, "@alice:test", alice.owner.selfSigningKey()) {
		t.Errorf("kept %s", found.Claims[0].DeviceKeys)
	}
}

// A sender can make up as many signers as there are messages. What they sign is not kept for ever.
func TestObjectsOfMadeUpSignersAreBounded(t *testing.T) {
	w, alice, _ := twoPeople(t)
	for range 20 {
		keys := alice.selfSignedKeys()
		made := newActor("@alice:test")
		signInto(keys, "@alice:test", made.selfSigningKey().String(), made.selfSigning)
		w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom), embedding(keys))}})
	}
	own := deviceKeyPair{alice.senderKey(), alice.signingKey()}
	kept := must(w.hook.store.signedObjects(w.ctx, "@alice:test", own))
	if len(kept) == 0 || len(kept) > 8 {
		t.Errorf("%d objects are kept", len(kept))
	}
	if signers := must(w.hook.store.signers(w.ctx, "@alice:test", own.senderKey, own.signingKey)); len(signers) != 21 {
		t.Errorf("%d signers are known", len(signers))
	}
	// The user's own key is never one too many.
	rotated := must(olm.NewPKSigning())
	alice.owner.selfSigning = rotated
	w.know(alice.owner)
	alice.unpublished = true
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
	if kept = must(w.hook.store.signedObjects(w.ctx, "@alice:test", own)); kept[rotated.PublicKey()] == nil {
		t.Error("what the user's self-signing key has signed is not kept")
	}
	keys := alice.keys()
	keys["padding"] = strings.Repeat("x", maxEvidence)
	if asKept(rawJSON(keys)) != nil {
		t.Error("a long object is kept")
	}
}

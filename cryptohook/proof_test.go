package cryptohook

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto/canonicaljson"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// provable are the codes that there are proofs of.
var provable = map[Code]bool{
	CodeVerified: true, CodeUnverifiedIdentity: true, CodeIdentityChanged: true, CodeVerificationViolation: true, CodeUnsignedDevice: true,
}

// proveAsWell sees that what can be proven is accepted as what the handler was told, and that nothing else can be.
func (w *truthWorld) proveAsWell(when string, evt object, told Verdict) {
	w.t.Helper()
	proof, err := w.hook.Prove(w.ctx, fromServer(evt))
	if unprovable, ok := errors.AsType[*UnprovableError](err); ok {
		// Of a device that was never published, and whose keys nobody signed, no copy is kept.
		if provable[told.Code] && !(told.Code == CodeUnsignedDevice && unprovable.Reason == NoProofNoDeviceKeys) {
			w.t.Errorf("%s: %s is not provable: %s", when, told.Code, unprovable.Reason)
		}
		return
	} else if err != nil {
		w.t.Fatal(err)
	}
	report, err := VerifyProof(rawJSON(proof), w.bot.masterKey())
	if err != nil {
		w.t.Fatal(err)
	}
	if report.Code != told.Code || report.State != told.State || report.MasterKey != told.MasterKey || !provable[told.Code] {
		w.t.Errorf("%s: the proof says %+v, and the handler was told %+v", when, report, told)
	}
}

// aliceProof is a proof of a message of alice, whom the bot has verified unless change undoes that.
func aliceProof(t *testing.T, change ...func(w *trustWorld, alice *actorDevice)) (w *trustWorld, alice *actorDevice, file []byte) {
	t.Helper()
	w, alice, _ = twoPeople(t)
	if len(change) == 0 {
		if err := w.hook.Verify(w.ctx, alice.owner.userID, alice.owner.masterKey()); err != nil {
			t.Fatal(err)
		}
	}
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	for _, c := range change {
		c(w, alice)
	}
	w.clock.advance(time.Minute)
	return w, alice, rawJSON(must(w.hook.Prove(w.ctx, fromServer(w.say(alice, s, "I never said that")))))
}

func TestGoodProofIsAcceptedAndSaysWhatItProves(t *testing.T) {
	w, alice, file := aliceProof(t)
	if strings.Contains(string(file), "I never said that") {
		t.Error("the proof holds the message")
	}
	report, err := VerifyProof(file, w.bot.masterKey())
	if err != nil {
		t.Fatal(err)
	}
	want := ProofReport{
		RoomID: trustRoom, EventID: "$event1", Sender: "@alice:test", SentAt: time.UnixMilli(1_700_000_000_001),
		DeviceID: "ALICE", SenderKey: alice.senderKey(), SigningKey: alice.signingKey(), SessionID: report.SessionID, Source: SourceDirect,
		ReceivedAt: w.clock.Now().Add(-time.Minute), MadeAt: w.clock.Now(), Code: CodeVerified, State: StateSenderVerified,
		MasterKey: alice.owner.masterKey(), TodaysMasterKey: alice.owner.masterKey(), FirstMasterKey: alice.owner.masterKey(), VerifiedBy: VerifiedBySignature,
		BotUserID: w.bot.userID, BotDeviceID: "BOTDEVICE", BotMasterKey: w.bot.masterKey(),
		Proven:    []ProofFact{ProvenBot, ProvenDevice, ProvenOwner, ProvenVerified, ProvenVerdict},
		NotProven: []ProofFact{UnprovenText, UnprovenEvent, UnprovenOrigin, UnprovenTimes, UnprovenHistory},
		Steps: []Step{
			{"D", StepSigned}, {"E", StepIdentityKnown}, {"G", StepSignedByOwner}, {"H", StepSignatureValid}, {"J", StepVerified},
		},
	}
	if string(rawJSON(report)) != string(rawJSON(want)) {
		t.Errorf("report %s\nwant   %s", rawJSON(report), rawJSON(want))
	}
}

// The file's signature is one as Matrix wants it, so that other programs can check it, too.
func TestProofIsSignedAsMatrixObjectsAre(t *testing.T) {
	w, _, file := aliceProof(t)
	valid, err := signatures.VerifySignatureJSON(json.RawMessage(file), w.bot.userID, "BOTDEVICE", w.hook.mach.GetAccount().SigningKey())
	if err != nil || !valid {
		t.Errorf("mautrix says %v, %v", valid, err)
	}
	canonical := json.RawMessage(slices.Clone(file))
	if err = canonicaljson.Canonicalize(&canonical); err != nil || string(canonical) != string(file) {
		t.Errorf("it is not canonical: %v", err)
	}
	// It says the same with other spaces.
	var spaced any
	if err = json.Unmarshal(file, &spaced); err != nil {
		t.Fatal(err)
	}
	if _, err = VerifyProof(must(json.MarshalIndent(spaced, "", "\t")), w.bot.masterKey()); err != nil {
		t.Errorf("indented: %v", err)
	}
}

func TestProofsOfOtherVerdicts(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(w *trustWorld, alice *actorDevice)
		code   Code
		proven []ProofFact
		check  func(t *testing.T, report *ProofReport)
	}{
		"unverified": {func(*trustWorld, *actorDevice) {}, CodeUnverifiedIdentity, []ProofFact{ProvenBot, ProvenDevice, ProvenOwner, ProvenVerdict}, nil},
		"pinned": {func(w *trustWorld, alice *actorDevice) {
			w.options.VerifiedUsers = map[id.UserID]id.Ed25519{"@alice:test": alice.owner.masterKey()}
			w.restart()
			if err := w.hook.Recheck(w.ctx, []id.UserID{"@alice:test"}); err != nil {
				w.t.Fatal(err)
			}
		}, CodeVerified, []ProofFact{ProvenBot, ProvenDevice, ProvenOwner, ProvenVerified, ProvenVerdict}, func(t *testing.T, report *ProofReport) {
			if report.VerifiedBy != VerifiedByPin || report.PinnedKey != report.MasterKey {
				t.Errorf("verified by %q, pinned %q", report.VerifiedBy, report.PinnedKey)
			}
		}},
		"pinned to another key": {func(w *trustWorld, alice *actorDevice) {
			w.options.VerifiedUsers = map[id.UserID]id.Ed25519{"@alice:test": w.bot.masterKey()}
			w.restart()
			w.know(alice.owner)
		}, CodeVerificationViolation, []ProofFact{ProvenBot, ProvenDevice, ProvenOwner, ProvenVerdict}, nil},
		"withdrawn": {func(w *trustWorld, alice *actorDevice) {
			alice.owner.verifiedBy = w.bot
			w.know(alice.owner)
			if err := w.hook.WithdrawVerification(w.ctx, "@alice:test"); err != nil {
				w.t.Fatal(err)
			}
		}, CodeUnverifiedIdentity, []ProofFact{ProvenBot, ProvenDevice, ProvenOwner, ProvenVerdict}, func(t *testing.T, report *ProofReport) {
			if !report.Withdrawn || report.VerifiedBy != "" {
				t.Errorf("withdrawn %v, verified by %q", report.Withdrawn, report.VerifiedBy)
			}
		}},
		"reset": {func(w *trustWorld, alice *actorDevice) {
			alice.owner.reset()
			w.know(alice.owner)
		}, CodeIdentityChanged, []ProofFact{ProvenBot, ProvenDevice, ProvenOwner, ProvenVerdict}, func(t *testing.T, report *ProofReport) {
			if report.MasterKey == report.TodaysMasterKey || report.MasterKey != report.FirstMasterKey {
				t.Errorf("master key %s, first %s, today's %s", report.MasterKey, report.FirstMasterKey, report.TodaysMasterKey)
			}
		}},
		"violation": {func(w *trustWorld, alice *actorDevice) {
			if err := w.hook.Verify(w.ctx, "@alice:test", alice.owner.masterKey()); err != nil {
				w.t.Fatal(err)
			}
			alice.owner.reset()
			w.know(alice.owner)
		}, CodeVerificationViolation, []ProofFact{ProvenBot, ProvenDevice, ProvenOwner, ProvenVerdict}, nil},
		"unsigned": {func(w *trustWorld, alice *actorDevice) {
			alice.owner.selfSigning, alice.crossSigned = newActor("@alice:test").selfSigning, false
			w.know(alice.owner)
		}, CodeUnsignedDevice, []ProofFact{ProvenBot, ProvenDevice, ProvenVerdict}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			w, _, file := aliceProof(t, tc.change)
			report, err := VerifyProof(file, w.bot.masterKey())
			if err != nil {
				t.Fatal(err)
			}
			if report.Code != tc.code || !slices.Equal(report.Proven, tc.proven) {
				t.Errorf("%s, proven %v", report.Code, report.Proven)
			}
			if !slices.Contains(report.NotProven, UnprovenEvent) || report.Code != CodeUnsignedDevice && !slices.Contains(report.NotProven, UnprovenHistory) {
				t.Errorf("not proven %v: which event it is, and what was before, is the bot's word", report.NotProven)
			}
			if tc.check != nil {
				tc.check(t, report)
			}
		})
	}
}

func TestBotsOwnMessageIsProvable(t *testing.T) {
	w, _, _ := twoPeople(t)
	w.know(w.bot)
	if err := w.hook.mach.ShareGroupSession(w.ctx, trustRoom, nil); err != nil {
		t.Fatal(err)
	}
	content := must(w.hook.mach.EncryptMegolmEvent(w.ctx, trustRoom, event.EventMessage, object{"msgtype": "m.notice", "body": "hello"}))
	evt := w.roomEvent(w.bot.userID, "m.room.encrypted", content)
	report, err := VerifyProof(rawJSON(must(w.hook.Prove(w.ctx, fromServer(evt)))), w.bot.masterKey())
	if err != nil || report.Code != CodeVerified || report.VerifiedBy != "" {
		t.Errorf("%+v, %v", report, err)
	}
}

func TestNothingFalseOrWithheldIsProven(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s, forged, disputed := newMegolm(trustRoom), newMegolm(trustRoom), newMegolm(trustRoom)
	ghost := alice.owner.addDevice("GHOST")
	ghost.unpublished = true
	unknown := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{
		w.share(alice, s), w.share(mallory, forged, embedding(mallory.forgedKeys())), w.share(alice, disputed), w.share(mallory, disputed),
		w.share(ghost, unknown, withoutDeviceKeys),
	}})
	w.resolve()
	for name, tc := range map[string]struct {
		evt    object
		reason ProofReason
	}{
		"plaintext":     {w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "x"}), NoProofNotEncrypted},
		"no key":        {w.say(alice, newMegolm(trustRoom), "x"), NoProofUndecryptable},
		"sent on":       {w.copyOf(w.say(alice, s, "x"), mallory.owner.userID), NoProofWithheld},
		"rejected":      {w.say(mallory, forged, "x"), NoProofWithheld},
		"disputed":      {w.say(alice, disputed, "x"), NoProofConflict},
		"nobody's":      {w.say(ghost, unknown, "x"), NoProofNobody},
		"not a message": {w.roomEvent("@alice:test", "m.room.encrypted", object{}), NoProofUndecryptable},
	} {
		_, err := w.hook.Prove(w.ctx, fromServer(tc.evt))
		unprovable, ok := errors.AsType[*UnprovableError](err)
		if !ok || unprovable.Reason != tc.reason || unprovable.Verdict.Code == "" {
			t.Errorf("%s: %v, want %s", name, err, tc.reason)
		}
	}
	good := w.say(alice, s, "x")
	if _, err := w.hook.Prove(w.ctx, fromServer(good)); err != nil {
		t.Error(err)
	}
	// From before objects were kept.
	if _, err := w.db.Exec(w.ctx, "UPDATE sendertrust_identity_key SET master_object=NULL"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.Prove(w.ctx, fromServer(good)); !strings.Contains(fmt.Sprint(err), string(NoProofIncomplete)) {
		t.Errorf("without the master key as it was signed: %v", err)
	}
	if _, err := w.db.Exec(w.ctx, "UPDATE sendertrust_signature SET device_keys=NULL"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.db.Exec(w.ctx, "DELETE FROM sendertrust_device"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.Prove(w.ctx, fromServer(good)); !strings.Contains(fmt.Sprint(err), string(NoProofNoDeviceKeys)) {
		t.Errorf("without the device's keys: %v", err)
	}
	w.hook.mach.CrossSigningKeys = nil
	if _, err := w.hook.Prove(w.ctx, fromServer(good)); err == nil {
		t.Error("a bot without an identity proves something")
	}
}

// tampering is a proof that somebody changes.
type tampering struct {
	w     *trustWorld
	alice *actorDevice
	tree  map[string]any
}

func (f *tampering) at(names ...string) map[string]any {
	object := f.tree
	for _, name := range names {
		object = object[name].(map[string]any)
	}
	return object
}

func (f *tampering) set(path string, value any) {
	names := strings.Split(path, ".")
	f.at(names[:len(names)-1]...)[names[len(names)-1]] = value
}

// sum makes the checksums fit, as a forger would who has read this program.
func (f *tampering) sum() { f.tree["checksums"] = checksumsOf(f.tree) }

// sign has the bot's own device sign what was forged: what is found after that is found by the other signatures, and by the verdict.
func (f *tampering) sign() {
	f.sum()
	delete(f.tree, "signatures")
	signature := must(f.w.hook.mach.GetAccount().Internal.Sign(canonicalJSON(f.tree)))
	f.tree["signatures"] = map[string]any{"@bot:test": map[string]any{"ed25519:BOTDEVICE": string(signature)}}
}

// other is a key that differs in its first character.
func other(key any) string {
	text := fmt.Sprint(key)
	if text[0] == 'A' {
		return "B" + text[1:]
	}
	return "A" + text[1:]
}

func tree(object object) map[string]any { return must(parseStrict(rawJSON(object))).(map[string]any) }

func TestTamperedProofIsRefusedWithTheFieldNamed(t *testing.T) {
	w, alice, good := aliceProof(t)
	mallory := newActor("@alice:test") // somebody who has made another identity for alice
	ownKey, aliceMSK, aliceSSK := w.bot.userSigning.PublicKey().String(), alice.owner.masterKey().String(), alice.owner.selfSigningKey().String()
	botSSK := w.bot.selfSigningKey().String()
	const madeUp = "another valid identity that the bot has verified"
	const sealed = `signatures["@bot:test"]["ed25519:BOTDEVICE"]`
	for name, tc := range map[string]struct {
		forge func(f *tampering)
		field string
	}{
		// What a single change shows.
		"room":               {func(f *tampering) { f.set("event.room_id", "!other:test") }, "event.room_id"},
		"event":              {func(f *tampering) { f.set("event.event_id", "$other") }, "event.event_id"},
		"sender":             {func(f *tampering) { f.set("event.sender", "@mallory:test") }, "event.sender"},
		"time of sending":    {func(f *tampering) { f.set("event.origin_server_ts", 5) }, "event.origin_server_ts"},
		"time of receiving":  {func(f *tampering) { f.set("session.received_at_ts", 5) }, "session.received_at_ts"},
		"time of making":     {func(f *tampering) { f.set("made_at_ts", 5) }, "made_at_ts"},
		"session ID":         {func(f *tampering) { f.set("session.session_id", other(f.at("session")["session_id"])) }, "session.session_id"},
		"device ID":          {func(f *tampering) { f.set("session.device_id", "OTHER") }, "session.device_id"},
		"sender key":         {func(f *tampering) { f.set("session.sender_key", other(f.at("session")["sender_key"])) }, "session.sender_key"},
		"signing key":        {func(f *tampering) { f.set("session.signing_key", other(f.at("session")["signing_key"])) }, "session.signing_key"},
		"source":             {func(f *tampering) { f.set("session.source", "backup") }, "session.source"},
		"code":               {func(f *tampering) { f.set("verdict.code", "unverified_identity") }, "verdict.code"},
		"state":              {func(f *tampering) { f.set("verdict.state", "sender_unverified") }, "verdict.state"},
		"first master key":   {func(f *tampering) { f.set("identity.first_master_key", other(aliceMSK)) }, "identity.first_master_key"},
		"a pin":              {func(f *tampering) { f.set("identity.pinned_key", aliceMSK) }, "identity.pinned_key"},
		"withdrawal":         {func(f *tampering) { f.set("identity.withdrawn", true) }, "identity.withdrawn"},
		"the bot's user ID":  {func(f *tampering) { f.set("bot.user_id", "@mallory:test") }, "bot.user_id"},
		"a field taken out":  {func(f *tampering) { delete(f.at("identity"), "was_verified") }, "identity.was_verified"},
		"the identity alone": {func(f *tampering) { delete(f.tree, "identity") }, "identity.first_master_key"},
		// What those find who make the checksums fit.
		"room, summed": {func(f *tampering) { f.set("event.room_id", "!other:test"); f.sum() }, sealed},
		"time, summed": {func(f *tampering) { f.set("event.origin_server_ts", 5); f.sum() }, sealed},
		"code, summed": {func(f *tampering) { f.set("verdict.code", "unverified_identity"); f.sum() }, "verdict.code"},
		// Each signature and each key.
		"the device's signature": {func(f *tampering) {
			f.at("device_keys", "signatures", "@alice:test")["ed25519:ALICE"] = forgedSignature()
		}, `device_keys.signatures["@alice:test"]["ed25519:ALICE"]`},
		"the self-signing key's signature on the device": {func(f *tampering) {
			f.at("device_keys", "signatures", "@alice:test")["ed25519:"+aliceSSK] = forgedSignature()
		}, `device_keys.signatures["@alice:test"]["ed25519:` + aliceSSK + `"]`},
		"that signature stripped": {func(f *tampering) {
			delete(f.at("device_keys", "signatures", "@alice:test"), "ed25519:"+aliceSSK)
		}, `device_keys.signatures["@alice:test"]["ed25519:` + aliceSSK + `"]`},
		"the master key's signature": {func(f *tampering) {
			f.at("identity", "self_signing_key", "signatures", "@alice:test")["ed25519:"+aliceMSK] = forgedSignature()
		}, `identity.self_signing_key.signatures["@alice:test"]["ed25519:` + aliceMSK + `"]`},
		"the bot's signature on the master key": {func(f *tampering) {
			f.at("identity", "master_key", "signatures", "@bot:test")["ed25519:"+ownKey] = forgedSignature()
		}, `identity.master_key.signatures["@bot:test"]["ed25519:` + ownKey + `"]`},
		"that signature stripped, too": {func(f *tampering) { delete(f.at("identity", "master_key"), "signatures") }, `identity.master_key.signatures["@bot:test"]["ed25519:` + ownKey + `"]`},
		"the bot's user-signing key's signature": {func(f *tampering) {
			f.at("bot", "user_signing_key", "signatures", "@bot:test")["ed25519:"+w.bot.masterKey().String()] = forgedSignature()
		}, `bot.user_signing_key.signatures["@bot:test"]["ed25519:` + w.bot.masterKey().String() + `"]`},
		"the bot's self-signing key's signature": {func(f *tampering) {
			f.at("bot", "device_keys", "signatures", "@bot:test")["ed25519:"+botSSK] = forgedSignature()
		}, `bot.device_keys.signatures["@bot:test"]["ed25519:` + botSSK + `"]`},
		"the bot's device's own signature": {func(f *tampering) {
			f.at("bot", "device_keys", "signatures", "@bot:test")["ed25519:BOTDEVICE"] = forgedSignature()
		}, `bot.device_keys.signatures["@bot:test"]["ed25519:BOTDEVICE"]`},
		"the file's signature":          {func(f *tampering) { f.at("signatures", "@bot:test")["ed25519:BOTDEVICE"] = forgedSignature() }, sealed},
		"the file's signature stripped": {func(f *tampering) { delete(f.tree, "signatures") }, "signatures"},
		"the signature of another device": {func(f *tampering) {
			of := f.at("signatures", "@bot:test")
			of["ed25519:OTHER"] = of["ed25519:BOTDEVICE"]
			delete(of, "ed25519:BOTDEVICE")
		}, sealed},
		"a second signature": {func(f *tampering) { f.at("signatures", "@bot:test")["ed25519:OTHER"] = "" }, `signatures["@bot:test"]`},
		"a device key": {func(f *tampering) {
			f.at("device_keys", "keys")["curve25519:ALICE"] = other(alice.senderKey())
		}, `device_keys.signatures["@alice:test"]["ed25519:ALICE"]`},
		"the device's user": {func(f *tampering) { f.set("device_keys.user_id", "@mallory:test") }, "device_keys.user_id"},
		"the device's ID":   {func(f *tampering) { f.set("device_keys.device_id", "OTHER") }, "device_keys.device_id"},
		"the master key": {func(f *tampering) {
			f.set("identity.master_key.keys", map[string]any{"ed25519:" + other(aliceMSK): other(aliceMSK)})
		}, `identity.self_signing_key.signatures["@alice:test"]["ed25519:` + other(aliceMSK) + `"]`},
		"the self-signing key": {func(f *tampering) {
			f.set("identity.self_signing_key.keys", map[string]any{"ed25519:" + other(aliceSSK): other(aliceSSK)})
		}, `identity.self_signing_key.signatures["@alice:test"]["ed25519:` + aliceMSK + `"]`},
		"the self-signing key's usage": {func(f *tampering) { f.set("identity.self_signing_key.usage", []any{"master"}) }, "identity.self_signing_key.usage"},
		"two keys in one": {func(f *tampering) {
			f.at("identity", "master_key", "keys")["ed25519:"+aliceSSK] = aliceSSK
		}, "identity.master_key.keys"},
		"the bot's master key": {func(f *tampering) {
			f.set("bot.master_key.keys", map[string]any{"ed25519:" + aliceMSK: aliceMSK})
		}, "bot.master_key"},
		"the bot's other keys": {func(f *tampering) {
			f.set("bot.self_signing_key.keys", map[string]any{"ed25519:" + aliceSSK: aliceSSK})
		}, `bot.self_signing_key.signatures["@bot:test"]["ed25519:` + w.bot.masterKey().String() + `"]`},
		// Others' valid parts.
		"another valid identity": {func(f *tampering) {
			f.at("identity")["master_key"], f.at("identity")["self_signing_key"] = tree(mallory.masterObject()), tree(mallory.selfSigningObject())
		}, `identity.master_key.signatures["@bot:test"]["ed25519:` + ownKey + `"]`},
		madeUp: {func(f *tampering) {
			verified := newActor("@alice:test")
			verified.verifiedBy = w.bot
			f.at("identity")["master_key"], f.at("identity")["self_signing_key"] = tree(verified.masterObject()), tree(verified.selfSigningObject())
			f.sign()
		}, `device_keys.signatures["@alice:test"]`},
		"the identity of another user": {func(f *tampering) {
			bob := newActor("@bob:test")
			f.at("identity")["master_key"], f.at("identity")["self_signing_key"] = tree(bob.masterObject()), tree(bob.selfSigningObject())
		}, "identity.master_key.user_id"},
		"another device of alice": {func(f *tampering) {
			f.tree["device_keys"] = tree((&actorDevice{owner: alice.owner, deviceID: "ALICE", account: newActor("@a:b").addDevice("X").account, crossSigned: true}).keys())
			f.sign()
		}, "session.sender_key"},
		// What the bot itself would have to sign.
		"pinned, and not signed": {func(f *tampering) {
			f.set("identity.pinned_key", aliceMSK)
			delete(f.at("identity", "master_key"), "signatures")
			f.sign()
		}, `identity.master_key.signatures["@bot:test"]["ed25519:` + ownKey + `"]`},
		"verified, and withdrawn": {func(f *tampering) {
			f.set("identity.withdrawn", true)
			f.set("identity.was_verified", false)
			f.sign()
		}, "verdict.code"},
		"verified, and pinned to another key":      {func(f *tampering) { f.set("identity.pinned_key", aliceSSK); f.sign() }, "verdict.code"},
		"another state":                            {func(f *tampering) { f.set("verdict.state", "verification_violation"); f.sign() }, "verdict.state"},
		"verified by a former key that is today's": {func(f *tampering) { f.set("identity.formerly_verified_by", ownKey); f.sign() }, "identity.formerly_verified_by"},
		"today's identity as an earlier one": {func(f *tampering) {
			f.tree["earlier_identity"] = map[string]any{"master_key": f.at("identity")["master_key"], "self_signing_key": f.at("identity")["self_signing_key"]}
			f.sign()
		}, "earlier_identity.master_key"},
		// Strict JSON.
		"an unknown field":                        {func(f *tampering) { f.tree["more"] = "x" }, "more"},
		"an unknown field within":                 {func(f *tampering) { f.at("event")["type"] = "x" }, "event.type"},
		"an unknown field without anything in it": {func(f *tampering) { f.tree["more"] = map[string]any{}; f.sign() }, "more"},
		"a name in other letters":                 {func(f *tampering) { f.tree["Format"] = f.tree["format"] }, "Format"},
		"a key with padding":                      {func(f *tampering) { f.set("session.sender_key", alice.senderKey().String()+"=") }, "session.sender_key"},
		"a master key with padding": {func(f *tampering) {
			f.set("identity.master_key.keys", map[string]any{"ed25519:" + aliceMSK + "=": aliceMSK + "="})
		}, "identity.master_key.keys"},
		"a text for a number":      {func(f *tampering) { f.set("event.origin_server_ts", "5") }, "event.origin_server_ts"},
		"a negative time":          {func(f *tampering) { f.set("made_at_ts", -5) }, "made_at_ts"},
		"a number for a text":      {func(f *tampering) { f.set("event.room_id", 5) }, "event.room_id"},
		"an empty text":            {func(f *tampering) { f.set("event.room_id", "") }, "event.room_id"},
		"a text for an object":     {func(f *tampering) { f.tree["device_keys"] = "x" }, "device_keys"},
		"a list for the checksums": {func(f *tampering) { f.tree["checksums"] = []any{} }, "checksums"},
		"a checksum too many":      {func(f *tampering) { f.at("checksums")["event.type"] = "x" }, "event.type"},
		"a number for a flag":      {func(f *tampering) { f.set("verdict.outdated", 0) }, "verdict.outdated"},
		"another format":           {func(f *tampering) { f.tree["format"] = "x"; f.sign() }, "format"},
		"another version":          {func(f *tampering) { f.tree["version"] = 2; f.sign() }, "version"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &tampering{w: w, alice: alice, tree: must(parseStrict(good)).(map[string]any)}
			tc.forge(f)
			report, err := VerifyProof(canonicalJSON(f.tree), w.bot.masterKey())
			fault, ok := errors.AsType[*ProofError](err)
			// Whose signature is missing of an identity that the case has made up is part of the name, too.
			named := ok && (fault.Field == tc.field || name == madeUp && strings.HasPrefix(fault.Field, tc.field))
			if !named || report != nil || fault.Fault == "" {
				t.Errorf("error %v\nwant the field %s", err, tc.field)
			}
		})
	}
	report, err := VerifyProof(good, newActor("@bot:test").masterKey())
	if fault, ok := errors.AsType[*ProofError](err); !ok || report != nil || fault.Field != "bot.master_key" {
		t.Errorf("with another bot's master key: %v", err)
	}
}

func TestFileThatIsNoProofIsRefused(t *testing.T) {
	w, _, good := aliceProof(t)
	for name, tc := range map[string]struct{ file, field string }{
		"empty":                     {"", ""},
		"no JSON":                   {"hello", ""},
		"a list":                    {"[]", ""},
		"cut off":                   {string(good[:len(good)/2]), "?"},
		"goes on":                   {string(good) + "{}", ""},
		"too long":                  {string(good) + strings.Repeat(" ", maxProof), ""},
		"not UTF-8":                 {strings.Replace(string(good), "!room", "!r\xffoom", 1), ""},
		"half a character":          {strings.Replace(string(good), "!room", `!r\ud800oom`, 1), "event.room_id"},
		"a name twice":              {strings.Replace(string(good), `"event":{`, `"event":{"event_id":"$other",`, 1), "event.event_id"},
		"a name twice, on top":      {strings.Replace(string(good), `{`, `{"version":1,`, 1), "version"},
		"a fraction":                {strings.Replace(string(good), `"version":1`, `"version":1.0`, 1), "version"},
		"a number with an exponent": {strings.Replace(string(good), `"version":1`, `"version":1e0`, 1), "version"},
		"a huge number":             {strings.Replace(string(good), `"version":1`, `"version":9007199254740993`, 1), "version"},
		"deep":                      {strings.Replace(string(good), `"version":1`, `"version":`+strings.Repeat("[", 100)+strings.Repeat("]", 100), 1), "?"},
	} {
		report, err := VerifyProof([]byte(tc.file), w.bot.masterKey())
		fault, ok := errors.AsType[*ProofError](err)
		if !ok || report != nil || tc.field != "?" && fault.Field != tc.field {
			t.Errorf("%s: %v, want the field %q", name, err, tc.field)
		}
	}
}

func TestHalfACharacterIsNoText(t *testing.T) {
	for _, text := range []string{`{"a":"\ud800"}`, `{"\udfff":1}`, `["\ud800x"]`} {
		if value, err := parseStrict([]byte(text)); err == nil {
			t.Errorf("%s is read as %q", text, value)
		}
	}
}

// The name of a signature's key may be written in one way only, and so may the signature: the last characters of base64 hold bits that mean nothing.
func TestSignatureIsWrittenInOneWay(t *testing.T) {
	w, _, good := aliceProof(t)
	f := &tampering{w: w, tree: must(parseStrict(good)).(map[string]any)}
	of := f.at("signatures", "@bot:test")
	genuine := of["ed25519:BOTDEVICE"].(string)
	raw := must(base64.RawStdEncoding.DecodeString(genuine))
	for _, last := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/" {
		written := genuine[:85] + string(last)
		if same, err := base64.RawStdEncoding.DecodeString(written); written == genuine || err != nil || string(same) != string(raw) {
			continue
		}
		of["ed25519:BOTDEVICE"] = written
		if _, err := VerifyProof(canonicalJSON(f.tree), w.bot.masterKey()); err == nil {
			t.Errorf("%s is accepted for %s", written, genuine)
		}
	}
}

// Every byte of a proof counts, but for what is the same in canonical JSON.
func TestEveryByteOfAProofCounts(t *testing.T) {
	w, _, good := aliceProof(t)
	want := canonicalOf(good)
	step := 1
	if underRace { // it has nothing to find here
		step = 8
	}
	for i := 0; i < len(good); i += step {
		flipped := slices.Clone(good)
		flipped[i] ^= 1 << (i % 8)
		checkFlipped(t, w.bot.masterKey(), want, flipped)
	}
}

func checkFlipped(t *testing.T, masterKey id.Ed25519, want string, flipped []byte) {
	t.Helper()
	report, err := VerifyProof(flipped, masterKey)
	if err == nil && canonicalOf(flipped) != want {
		t.Errorf("accepted: %s", flipped)
	}
	if fault, ok := errors.AsType[*ProofError](err); err != nil && (!ok || fault.Fault == "" || report != nil) {
		t.Errorf("%+v, %v", report, err)
	}
}

// canonicalOf gives the canonical JSON of a text as mautrix writes it, empty if it is none.
func canonicalOf(text []byte) string {
	if !json.Valid(text) {
		return ""
	}
	raw := json.RawMessage(slices.Clone(text))
	if canonicaljson.Canonicalize(&raw) != nil {
		return ""
	}
	return string(raw)
}

// A proof that was made once is accepted for ever, or until the format gets another version.
func TestProofOfBeforeIsAccepted(t *testing.T) {
	file, masterKey := readProof(t)
	report, err := VerifyProof(file, masterKey)
	if err != nil || report.Code != CodeVerified || report.Sender != "@alice:test" {
		t.Errorf("%+v, %v", report, err)
	}
}

func TestChecksumsAreOfTheBotsWordOnly(t *testing.T) {
	_, _, good := aliceProof(t)
	sums := slices.Sorted(maps.Keys(checksumsOf(must(parseStrict(good)).(map[string]any))))
	if len(sums) < 15 || slices.Contains(sums, "device_keys") || slices.Contains(sums, "signatures") {
		t.Errorf("checksums of %v", sums)
	}
	if len(good) > 8000 {
		t.Errorf("a proof takes %d bytes", len(good))
	}
}

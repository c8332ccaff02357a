package cryptohook

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// FuzzKeyQuery: what a server answers when the bot asks for Alice's and Eve's keys. It changes nothing about anybody else, believes no key
// without its signature, forgets no first master key and nothing that was verified, and proves no session that crypto/ed25519 does not.
func FuzzKeyQuery(f *testing.F) {
	w := newFuzzWorld(f)
	for _, seed := range w.answerSeeds() {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		r := w.begin(t, len(answer), RequireNothing)
		defer r.end()
		before := r.identities()
		r.ask(answer)

		evidence := w.evidence()
		evidence.observe(answer)
		if !json.Valid(answer) {
			r.unchangedBut("the answer is no JSON")
		}
		r.unchangedBut("keys were published", "sendertrust_claim", "sendertrust_sender", "sendertrust_signature", "sendertrust_identity", "sendertrust_identity_key", "sendertrust_device")
		r.checkOthers()
		r.checkIdentities(before, answer)
		r.checkDevices(answer)
		r.settle()
		r.checkTrust(evidence)
	})
}

// ask has the hook see an answer to a question about Alice and Eve.
func (r *fuzzRun) ask(answer []byte) {
	r.t.Helper()
	question := rawJSON(mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{r.alice.userID: {}, r.eve.userID: {}}})
	req, err := http.NewRequestWithContext(r.ctx, http.MethodPost, "http://server.test/_matrix/client/v3/keys/query", bytes.NewReader(question))
	if err != nil {
		r.t.Fatal(err)
	}
	number := r.hook.questions.begin()
	defer r.hook.questions.end()
	if _, err = r.hook.observeKeyQuery(req, number, answer); err != nil {
		r.t.Fatalf("an answer cannot be stored, and would be asked for again and again: %v", err)
	}
}

// settle judges what was learnt; nobody is asked.
func (r *fuzzRun) settle() {
	r.t.Helper()
	if _, err := r.hook.resolver.judgeAnswered(r.ctx); err != nil {
		r.t.Fatal(err)
	}
}

func (r *fuzzRun) identities() map[id.UserID]*Identity {
	known := make(map[id.UserID]*Identity)
	for _, userID := range []id.UserID{r.alice.userID, r.eve.userID} {
		known[userID] = must(r.hook.store.identity(r.ctx, userID))
	}
	return known
}

// checkOthers sees that nothing is stored of people who were not asked about.
func (r *fuzzRun) checkOthers() {
	r.t.Helper()
	for table, before := range r.tables {
		if !strings.HasPrefix(table, "sendertrust_") || !strings.Contains(table, "_identity") && !strings.Contains(table, "_device") && !strings.Contains(table, "_sender") {
			continue
		}
		for _, row := range scanStrings(r.db.RawDB, "SELECT quote(user_id) FROM "+table+" WHERE user_id NOT IN ('@alice:test', '@eve:test')") {
			if !strings.Contains(before, row) {
				r.t.Errorf("%s has got a row of %s, and nobody has asked about that user", table, row)
			}
		}
	}
}

// checkIdentities sees that each change of an identity is backed by the objects of the answer, with valid signatures.
func (r *fuzzRun) checkIdentities(before map[id.UserID]*Identity, body []byte) {
	r.t.Helper()
	var answer keyQuery
	_ = json.Unmarshal(body, &answer)
	for userID, now := range r.identities() {
		was := before[userID]
		if *now == *was {
			continue
		}
		raw, selfSigning := answer.MasterKeys[userID], answer.SelfSigningKeys[userID]
		master, isMaster := readCrossSigning(raw, userID, id.XSUsageMaster)
		vouched := signedIndependently(raw, r.bot.userID, r.bot.userSigning.PublicKey().String(), r.bot.userSigning.PublicKey())
		switch {
		case !isMaster || now.MasterKey != master:
			r.t.Errorf("%s: the master key is %s, and the server does not say so", userID, now.MasterKey)
		case now.FirstMasterKey != was.FirstMasterKey:
			r.t.Errorf("%s: the first master key is forgotten", userID)
		case was.WasVerified && !now.WasVerified:
			r.t.Errorf("%s: that there was a verification is forgotten", userID)
		case now.VerifiedBy != "" && !vouched && (was.MasterKey != master || was.VerifiedBy != now.VerifiedBy), now.WasVerified && !was.WasVerified && !vouched:
			r.t.Errorf("%s counts as verified, and we have not signed the master key", userID)
		}
		if key, isKey := readCrossSigning(selfSigning, userID, id.XSUsageSelfSigning); now.SelfSigningKey != was.SelfSigningKey && now.SelfSigningKey != "" &&
			!(isKey && key == now.SelfSigningKey && signedIndependently(selfSigning, userID, master.String(), master)) {
			r.t.Errorf("%s: the self-signing key is %s, and the master key has not signed it", userID, now.SelfSigningKey)
		}
	}
}

// checkDevices sees that each device is published under its name and signed by itself, and that none which lives has got another key.
func (r *fuzzRun) checkDevices(body []byte) {
	r.t.Helper()
	var answer keyQuery
	_ = json.Unmarshal(body, &answer)
	for userID := range answer.DeviceKeys {
		for deviceID, raw := range answer.DeviceKeys[userID] {
			stored := must(r.hook.store.signingKey(r.ctx, userID, deviceID))
			keys, valid := readKeys(raw)
			for _, ofUser := range r.devices {
				for _, device := range ofUser {
					known := !device.unpublished && device.owner.userID == userID && device.deviceID == deviceID
					if known && stored != device.signingKey() && stored != "" {
						r.t.Errorf("%s has got another ed25519 key", deviceID)
					} else if known {
						valid = true
						keys.Keys = map[string]string{"ed25519:" + deviceID.String(): device.signingKey().String()}
						keys.UserID, keys.DeviceID = userID, deviceID
					}
				}
			}
			if stored != "" && (!valid || keys.UserID != userID || keys.DeviceID != deviceID || keys.signingKey() != stored) {
				r.t.Errorf("device %s of %s is stored, and has not signed its keys", deviceID, userID)
			}
		}
	}
}

// answerSeeds are honest answers, and what a lying server may make of them.
func (w *fuzzWorld) answerSeeds() (seeds []string) {
	change := func(change func(answer object)) {
		answer := w.keyAnswer()
		delete(answer["device_keys"].(object), w.bot.userID.String())
		change(answer)
		seeds = append(seeds, string(rawJSON(answer)))
	}
	part := func(answer object, key string) object { return answer[key].(object) }
	devices := func(answer object, a *actor) object { return part(answer, "device_keys")[a.userID.String()].(object) }
	intruder := w.devices[fuzzAlice][fuzzUnsigned]
	hidden := w.devices[fuzzEve][fuzzUnsigned]

	change(func(object) {})
	change(func(answer object) { answer["master_keys"], answer["self_signing_keys"] = object{}, object{} })
	change(func(answer object) {
		answer["device_keys"] = object{w.alice.userID.String(): object{}, w.eve.userID.String(): nil}
	})
	for _, keys := range w.keySeeds(intruder) {
		change(func(answer object) {
			name, _ := keys["device_id"].(string)
			devices(answer, w.alice)[name] = keys
		})
	}
	for _, keys := range w.keySeeds(hidden) {
		change(func(answer object) { devices(answer, w.eve)["HIDDEN"] = keys })
	}
	// Alice's device with the intruder's keys, and the intruder under the name of hers.
	alices := w.devices[fuzzAlice][fuzzSigned]
	change(func(answer object) {
		renamed := *intruder
		renamed.deviceID = alices.deviceID
		devices(answer, w.alice)["ALICE"] = renamed.selfSignedKeys()
	})
	change(func(answer object) {
		twin := *alices
		twin.deviceID, twin.account = "TWIN", intruder.account
		keys := twin.selfSignedKeys()
		keys["keys"].(object)["curve25519:TWIN"] = alices.senderKey().String()
		delete(keys, "signatures")
		signInto(keys, w.alice.userID, "TWIN", twin.account)
		devices(answer, w.alice)["TWIN"] = keys
	})
	// Identities: another one, with and without signatures, the bot's own, Eve's in Alice's name, keys that fit any signature.
	other := newFuzzActor(w.alice.userID)
	change(func(answer object) {
		part(answer, "master_keys")[w.alice.userID.String()], part(answer, "self_signing_keys")[w.alice.userID.String()] = other.masterObject(), other.selfSigningObject()
		keys := intruder.selfSignedKeys()
		signInto(keys, w.alice.userID, other.selfSigningKey().String(), other.selfSigning)
		devices(answer, w.alice)["INTRUDER"] = keys
	})
	change(func(answer object) {
		part(answer, "self_signing_keys")[w.alice.userID.String()] = other.selfSigningObject()
	})
	change(func(answer object) {
		unsigned := crossSigningObject(w.alice.userID, id.XSUsageSelfSigning, other.selfSigningKey())
		signInto(unsigned, w.alice.userID, w.alice.masterKey().String(), other.master)
		part(answer, "self_signing_keys")[w.alice.userID.String()] = unsigned
	})
	change(func(answer object) {
		master := crossSigningObject(w.alice.userID, id.XSUsageMaster, other.masterKey())
		genuine := w.alice.masterObject()["signatures"].(object)[w.bot.userID.String()]
		master["signatures"] = object{w.bot.userID.String(): genuine}
		part(answer, "master_keys")[w.alice.userID.String()] = master
	})
	change(func(answer object) {
		master := w.eve.masterObject()
		putSignature(master, w.bot.userID, w.bot.userSigning.PublicKey().String(), strings.Repeat("A", 86))
		part(answer, "master_keys")[w.eve.userID.String()] = master
	})
	change(func(answer object) {
		master := crossSigningObject(w.eve.userID, id.XSUsageMaster, w.alice.masterKey())
		part(answer, "master_keys")[w.eve.userID.String()] = master
	})
	change(func(answer object) { part(answer, "master_keys")[w.eve.userID.String()] = w.alice.masterObject() })
	change(func(answer object) {
		part(answer, "device_keys")[w.bot.userID.String()] = object{}
		part(answer, "master_keys")[w.bot.userID.String()] = crossSigningObject(w.bot.userID, id.XSUsageMaster, other.masterKey())
		part(answer, "device_keys")["@nobody:test"] = object{"X": hidden.selfSignedKeys()}
		part(answer, "master_keys")["@nobody:test"] = crossSigningObject("@nobody:test", id.XSUsageMaster, other.masterKey())
	})
	change(func(answer object) {
		const weak, fitsAll = id.Ed25519("AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"), "AQ" + "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
		selfSigning := crossSigningObject(w.alice.userID, id.XSUsageSelfSigning, weak)
		putSignature(selfSigning, w.alice.userID, weak.String(), fitsAll)
		part(answer, "master_keys")[w.alice.userID.String()] = crossSigningObject(w.alice.userID, id.XSUsageMaster, weak)
		part(answer, "self_signing_keys")[w.alice.userID.String()] = selfSigning
		keys := intruder.selfSignedKeys()
		putSignature(keys, w.alice.userID, weak.String(), fitsAll)
		devices(answer, w.alice)["INTRUDER"] = keys
	})
	// Names that are there twice: what a parser reads and what a signature covers may differ.
	genuine, forged := string(rawJSON(alices.keys())), string(rawJSON(intruder.selfSignedKeys()))
	for _, twice := range []string{
		strings.TrimSuffix(genuine, "}") + "," + strings.TrimPrefix(forged, "{"),
		strings.TrimSuffix(forged, "}") + "," + strings.TrimPrefix(genuine, "{"),
	} {
		seeds = append(seeds,
			`{"device_keys":{"@alice:test":{"INTRUDER":`+twice+`}}}`, `{"device_keys":{"@alice:test":{"ALICE":`+twice+`}}}`,
			`{"device_keys":{"@alice:test":{}},"master_keys":{"@alice:test":`+twice+`}}`)
	}
	return append(seeds, `null`, `[]`, `{`, `<html>502 Bad Gateway</html>`, `{"device_keys":{"@alice:test":null}}`, `{"device_keys":{"@alice:test":{"ALICE":null}}}`,
		`{"device_keys":5}`, `{"failures":{"test":{}}}`, `{"device_keys":{"@alice:test":{"X":{"user_id":"@alice:test"}}},"master_keys":{"@alice:test":[]}}`)
}

// newFuzzActor is another identity, the same in each process.
func newFuzzActor(userID id.UserID) (a *actor) {
	withFixedRandom(func() { a = newActor(userID) })
	// The first keys that are made so are the bot's.
	withFixedRandom(func() {
		for range 10 {
			a.reset()
		}
	})
	return a
}

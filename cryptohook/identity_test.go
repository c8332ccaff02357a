package cryptohook

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// identityWorld is a bot that judges alice's published keys.
type identityWorld struct {
	bot, alice, eve *actor
	anchor          trustAnchor
}

func newIdentityWorld() *identityWorld {
	w := &identityWorld{bot: newActor("@bot:test"), alice: newActor("@alice:test"), eve: newActor("@eve:test")}
	w.anchor = trustAnchor{userID: w.bot.userID, masterKey: w.bot.masterKey(), userSigningKey: w.bot.userSigning.PublicKey()}
	return w
}

func TestHonestIdentityIsRead(t *testing.T) {
	w := newIdentityWorld()
	got, err := w.anchor.readIdentity(w.alice.userID, rawJSON(w.alice.masterObject()), rawJSON(w.alice.selfSigningObject()))
	if err != nil {
		t.Fatal(err)
	}
	if *got != (publishedIdentity{masterKey: w.alice.masterKey(), selfSigningKey: w.alice.selfSigningKey()}) {
		t.Errorf("read %+v", got)
	}
}

func TestOurSignatureVerifiesAnIdentity(t *testing.T) {
	w := newIdentityWorld()
	w.alice.verifiedBy = w.bot
	got, err := w.anchor.readIdentity(w.alice.userID, rawJSON(w.alice.masterObject()), rawJSON(w.alice.selfSigningObject()))
	if err != nil || got.verifiedBy != w.bot.userSigning.PublicKey() {
		t.Errorf("verified by %q (%v)", got.verifiedBy, err)
	}
}

func TestExtraSignedFieldsCountInTheSignature(t *testing.T) {
	w := newIdentityWorld()
	master := w.alice.masterObject()
	master["org.example.extra"] = object{"deep": []any{1, "two", nil}, "html": "<&>\u2028"}
	signInto(master, w.bot.userID, w.bot.userSigning.PublicKey().String(), w.bot.userSigning)
	selfSigning := w.alice.selfSigningObject()
	delete(selfSigning, "signatures")
	selfSigning["org.example.extra"] = true
	signInto(selfSigning, w.alice.userID, w.alice.masterKey().String(), w.alice.master)
	got, err := w.anchor.readIdentity(w.alice.userID, rawJSON(master), rawJSON(selfSigning))
	if err != nil || got.verifiedBy == "" || got.selfSigningKey == "" {
		t.Errorf("an honest object with more fields is refused: %+v (%v)", got, err)
	}
	// What was not signed was put there by somebody else.
	delete(master, "org.example.extra")
	selfSigning["org.example.extra"] = false
	got, err = w.anchor.readIdentity(w.alice.userID, rawJSON(master), rawJSON(selfSigning))
	if !errors.Is(err, errSignatureInvalid) || got.verifiedBy != "" || got.selfSigningKey != "" {
		t.Errorf("an altered object is accepted: %+v (%v)", got, err)
	}
}

func TestUnsignedPartOfAnIdentityDoesNotCount(t *testing.T) {
	w := newIdentityWorld()
	selfSigning := w.alice.selfSigningObject()
	selfSigning["unsigned"] = object{"anything": "goes"}
	got, err := w.anchor.readIdentity(w.alice.userID, rawJSON(w.alice.masterObject()), rawJSON(selfSigning))
	if err != nil || got.selfSigningKey != w.alice.selfSigningKey() {
		t.Errorf("refused for its unsigned part: %+v (%v)", got, err)
	}
}

// forgedIdentities are answers of a server that lies about alice. None may give her a self-signing key that her master key did
// not sign, nor our signature that we did not make.
func TestForgedIdentityIsNotBelieved(t *testing.T) {
	for name, tc := range map[string]struct {
		forge func(w *identityWorld, master, selfSigning object)
		fault error
		// noMaster: not even the master key may be read.
		noMaster bool
	}{
		"self-signing key signed by another's master key": {fault: errSignatureInvalid, forge: func(w *identityWorld, _, ssk object) {
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.alice.masterKey().String(), w.eve.master)
		}},
		"self-signing key signed by another in that one's name": {fault: errSignatureInvalid, forge: func(w *identityWorld, _, ssk object) {
			delete(ssk, "signatures")
			signInto(ssk, w.eve.userID, w.eve.masterKey().String(), w.eve.master)
		}},
		"signature of the master key under another key's ID": {fault: errSignatureInvalid, forge: func(w *identityWorld, _, ssk object) {
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.eve.masterKey().String(), w.alice.master)
		}},
		"self-signing key signed by itself": {fault: errSignatureInvalid, forge: func(w *identityWorld, _, ssk object) {
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.alice.masterKey().String(), w.alice.selfSigning)
		}},
		"self-signing key without a signature": {fault: errSignatureInvalid, forge: func(_ *identityWorld, _, ssk object) {
			delete(ssk, "signatures")
		}},
		"signature is not a string": {fault: errSignatureInvalid, forge: func(w *identityWorld, _, ssk object) {
			ssk["signatures"] = object{w.alice.userID.String(): object{"ed25519:" + w.alice.masterKey().String(): ""}}
		}},
		"signature valid for other content": {fault: errSignatureInvalid, forge: func(w *identityWorld, _, ssk object) {
			ssk["keys"] = object{"ed25519:" + w.eve.selfSigningKey().String(): w.eve.selfSigningKey().String()}
		}},
		"key under another key's ID": {fault: errNotOneKey, forge: func(w *identityWorld, _, ssk object) {
			ssk["keys"] = object{"ed25519:" + w.eve.selfSigningKey().String(): w.alice.selfSigningKey().String()}
		}},
		"two keys in the self-signing object": {fault: errNotOneKey, forge: func(w *identityWorld, _, ssk object) {
			ssk["keys"].(object)["ed25519:"+w.eve.selfSigningKey().String()] = w.eve.selfSigningKey().String()
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.alice.masterKey().String(), w.alice.master)
		}},
		"no key in the self-signing object": {fault: errNotOneKey, forge: func(w *identityWorld, _, ssk object) {
			ssk["keys"] = object{}
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.alice.masterKey().String(), w.alice.master)
		}},
		"curve25519 key in the self-signing object": {fault: errNotOneKey, forge: func(w *identityWorld, _, ssk object) {
			ssk["keys"] = object{"curve25519:" + w.alice.selfSigningKey().String(): w.alice.selfSigningKey().String()}
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.alice.masterKey().String(), w.alice.master)
		}},
		"self-signing key of another user": {fault: errOtherUser, forge: func(w *identityWorld, _, ssk object) {
			ssk["user_id"] = w.eve.userID.String()
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.alice.masterKey().String(), w.alice.master)
		}},
		"user-signing key offered as self-signing key": {fault: errWrongUsage, forge: func(w *identityWorld, _, ssk object) {
			ssk["usage"] = []any{string(id.XSUsageUserSigning)}
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.alice.masterKey().String(), w.alice.master)
		}},
		"self-signing key for two usages": {fault: errWrongUsage, forge: func(w *identityWorld, _, ssk object) {
			ssk["usage"] = []any{string(id.XSUsageSelfSigning), string(id.XSUsageMaster)}
			delete(ssk, "signatures")
			signInto(ssk, w.alice.userID, w.alice.masterKey().String(), w.alice.master)
		}},
		"self-signing key of no usage": {fault: errWrongUsage, forge: func(_ *identityWorld, _, ssk object) { ssk["usage"] = []any{} }},
		"master key of another user": {noMaster: true, fault: errOtherUser, forge: func(w *identityWorld, master, _ object) {
			master["user_id"] = w.eve.userID.String()
		}},
		"self-signing key offered as master key": {noMaster: true, fault: errWrongUsage, forge: func(_ *identityWorld, master, _ object) {
			master["usage"] = []any{string(id.XSUsageSelfSigning)}
		}},
		"two keys in the master object": {noMaster: true, fault: errNotOneKey, forge: func(w *identityWorld, master, _ object) {
			master["keys"].(object)["ed25519:"+w.eve.masterKey().String()] = w.eve.masterKey().String()
		}},
		"our signature of another's master key": {fault: nil, forge: func(w *identityWorld, master, _ object) {
			w.eve.verifiedBy = w.bot
			master["signatures"] = w.eve.masterObject()["signatures"]
		}},
		"our user-signing key's ID, another's signature": {fault: nil, forge: func(w *identityWorld, master, _ object) {
			signInto(master, w.bot.userID, w.bot.userSigning.PublicKey().String(), w.eve.userSigning)
		}},
		"our user-signing key in alice's name": {fault: nil, forge: func(w *identityWorld, master, _ object) {
			signInto(master, w.alice.userID, w.bot.userSigning.PublicKey().String(), w.bot.userSigning)
		}},
		"signed by our master key instead": {fault: nil, forge: func(w *identityWorld, master, _ object) {
			signInto(master, w.bot.userID, w.bot.masterKey().String(), w.bot.master)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newIdentityWorld()
			master, selfSigning := w.alice.masterObject(), w.alice.selfSigningObject()
			tc.forge(w, master, selfSigning)
			got, err := w.anchor.readIdentity(w.alice.userID, rawJSON(master), rawJSON(selfSigning))
			if !errors.Is(err, tc.fault) {
				t.Errorf("error %v, want %v", err, tc.fault)
			}
			switch {
			case tc.noMaster && got != nil:
				t.Errorf("read %+v", got)
			case tc.noMaster:
			case got == nil || got.masterKey != w.alice.masterKey():
				t.Errorf("the master key is lost: %+v", got)
			case tc.fault != nil && got.selfSigningKey != "":
				t.Errorf("believed the self-signing key %s", got.selfSigningKey)
			case got.verifiedBy != "":
				t.Error("believed that we verified her")
			}
		})
	}
}

// A server that shows our own master key as alice's gains nothing: her devices are not signed by ours.
func TestOwnMasterKeyOfferedAsAnothersIsNotVerified(t *testing.T) {
	w := newIdentityWorld()
	master := crossSigningObject(w.alice.userID, id.XSUsageMaster, w.bot.masterKey())
	got, err := w.anchor.readIdentity(w.alice.userID, rawJSON(master), rawJSON(w.alice.selfSigningObject()))
	if !errors.Is(err, errSignatureInvalid) || got.selfSigningKey != "" || got.verifiedBy != "" {
		t.Fatalf("read %+v (%v)", got, err)
	}
	identity := &Identity{UserID: w.alice.userID}
	identity.merge(got, false)
	if standing := w.anchor.judge(identity); standing != StandingUnverified {
		t.Errorf("standing %s", standing)
	}
	// Nor with the whole of our own object.
	if got, err = w.anchor.readIdentity(w.alice.userID, rawJSON(w.bot.masterObject()), nil); !errors.Is(err, errOtherUser) || got != nil {
		t.Errorf("read %+v (%v)", got, err)
	}
}

func TestUnreadableIdentityIsNoIdentity(t *testing.T) {
	w := newIdentityWorld()
	for _, raw := range []string{``, `null`, `5`, `[]`, `"x"`, `{}`, `{"keys": 1}`, `{"keys": {"ed25519:": ""}}`, `{"user_id":"@alice:test","usage":["master"],"keys":{"ed25519:":""}}`} {
		got, _ := w.anchor.readIdentity(w.alice.userID, json.RawMessage(raw), json.RawMessage(raw))
		if got != nil {
			t.Errorf("%q was read as %+v", raw, got)
		}
	}
	// Keys that are no keys, with a signature by them.
	short := json.RawMessage(`{"user_id":"@alice:test","usage":["master"],"keys":{"ed25519:QQ":"QQ"}}`)
	ssk := json.RawMessage(`{"user_id":"@alice:test","usage":["self_signing"],"keys":{"ed25519:QQ":"QQ"},"signatures":{"@alice:test":{"ed25519:QQ":"QQ"}}}`)
	if got, err := w.anchor.readIdentity(w.alice.userID, short, ssk); !errors.Is(err, errNotAKey) || got != nil {
		t.Errorf("read %+v (%v)", got, err)
	}
}

// A JSON object may hold the same field twice; the signature must cover what is read.
func TestDoubledFieldsDoNotDeceive(t *testing.T) {
	w := newIdentityWorld()
	device, eves := w.alice.addDevice("DEVICE"), w.eve.addDevice("DEVICE")
	genuine := string(rawJSON(device.keys()))
	evil := `{"curve25519:DEVICE":"` + eves.senderKey().String() + `","ed25519:DEVICE":"` + device.signingKey().String() + `"}`
	inner := strings.TrimSuffix(strings.TrimPrefix(genuine, "{"), "}")
	evilSignatures := `"signatures":{"keys":1}`
	for name, raw := range map[string]string{
		"keys last":             `{` + inner + `,"keys":` + evil + `}`,
		"keys first":            `{"keys":` + evil + `,` + inner + `}`,
		"keys in other case":    `{` + inner + `,"KEYS":` + evil + `}`,
		"keys escaped":          `{` + inner + `,"\u006beys":` + evil + `}`,
		"in unsigned":           `{` + inner + `,"unsigned":{"keys":` + evil + `},"keys":` + evil + `}`,
		"signatures last":       `{` + inner + `,` + evilSignatures + `}`,
		"signatures first":      `{` + evilSignatures + `,` + inner + `}`,
		"unsigned in otherCase": `{` + inner + `,"Unsigned":{},"keys":` + evil + `}`,
		"unsigned twice":        `{"unsigned":{},` + inner + `,"unsigned":{"x":1},"keys":` + evil + `}`,
		"user in other case":    `{` + inner + `,"User_ID":"@eve:test"}`,
	} {
		keys, err := parseDeviceKeys(json.RawMessage(raw), w.alice.userID, "DEVICE")
		if err == nil {
			t.Errorf("%s: accepted as %+v", name, keys.Keys)
		}
		if signedBy(json.RawMessage(raw), w.alice.userID, w.alice.selfSigningKey()) {
			t.Errorf("%s: the self-signing key's signature is called valid", name)
		}
	}
	if _, err := parseDeviceKeys(json.RawMessage(genuine), w.alice.userID, "DEVICE"); err != nil {
		t.Errorf("the genuine keys are refused: %v", err)
	}
}

func TestForgedDeviceKeysAreRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		forge func(w *identityWorld, keys object)
		want  error
	}{
		"another user's":    {func(w *identityWorld, keys object) { keys["user_id"] = w.eve.userID.String() }, errOtherUser},
		"another device's":  {func(_ *identityWorld, keys object) { keys["device_id"] = "OTHER" }, errOtherDevice},
		"no curve25519 key": {func(_ *identityWorld, keys object) { delete(keys["keys"].(object), "curve25519:DEVICE") }, errKeyMissing},
		"no ed25519 key":    {func(_ *identityWorld, keys object) { delete(keys["keys"].(object), "ed25519:DEVICE") }, errKeyMissing},
		"no signature":      {func(_ *identityWorld, keys object) { delete(keys, "signatures") }, errSignatureInvalid},
		"other curve25519 key": {func(w *identityWorld, keys object) {
			keys["keys"].(object)["curve25519:DEVICE"] = strings.Repeat("A", 43)
		}, errSignatureInvalid},
		"curve25519 key that is none": {func(w *identityWorld, keys object) { keys["keys"].(object)["curve25519:DEVICE"] = "x" }, errNotAKey},
		"curve25519 key with a line's end": {func(w *identityWorld, keys object) {
			keys["keys"].(object)["curve25519:DEVICE"] = strings.Repeat("A", 42) + "\nA"
		}, errNotAKey},
		"curve25519 key that is short of what a line's end takes": {func(w *identityWorld, keys object) {
			keys["keys"].(object)["curve25519:DEVICE"] = strings.Repeat("A", 41) + "\nA"
		}, errNotAKey},
		"signed by the self-signing key only": {func(w *identityWorld, keys object) {
			delete(keys["signatures"].(object)[w.alice.userID.String()].(object), "ed25519:DEVICE")
		}, errSignatureInvalid},
		"another's signature in the device's name": {func(w *identityWorld, keys object) {
			delete(keys, "signatures")
			signInto(keys, w.alice.userID, "DEVICE", w.eve.master)
		}, errSignatureInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			w := newIdentityWorld()
			keys := w.alice.addDevice("DEVICE").keys()
			tc.forge(w, keys)
			if _, err := parseDeviceKeys(rawJSON(keys), w.alice.userID, "DEVICE"); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
}

func TestDeviceIDsAreBounded(t *testing.T) {
	w := newIdentityWorld()
	for length, want := range map[int]error{maxDeviceID: nil, maxDeviceID + 1: errLongDeviceID} {
		device := w.alice.addDevice(id.DeviceID(strings.Repeat("D", length)))
		if _, err := parseDeviceKeys(rawJSON(device.keys()), w.alice.userID, device.deviceID); !errors.Is(err, want) {
			t.Errorf("a device ID of %d bytes: error %v, want %v", length, err, want)
		}
	}
}

func TestDeviceKeysWithExtraSignedFieldsAreAccepted(t *testing.T) {
	w := newIdentityWorld()
	device := w.alice.addDevice("DEVICE")
	keys := device.selfSignedKeys()
	delete(keys, "signatures")
	keys["dehydrated"], keys["org.example"] = true, object{"b": 1, "a": []any{}}
	signInto(keys, w.alice.userID, "DEVICE", device.account)
	signInto(keys, w.alice.userID, w.alice.selfSigningKey().String(), w.alice.selfSigning)
	raw := rawJSON(keys)
	parsed, err := parseDeviceKeys(raw, w.alice.userID, "DEVICE")
	if err != nil {
		t.Fatal(err)
	}
	// What is embedded in an Olm message comes to us through mautrix's type, and must not lose them.
	if again := rawJSON(parsed); !signedBy(again, w.alice.userID, w.alice.selfSigningKey()) {
		t.Errorf("mautrix's type loses signed fields: %s", again)
	}
}

func TestJudge(t *testing.T) {
	const ours, formerly = id.Ed25519("our user-signing key"), id.Ed25519("our former user-signing key")
	anchor := trustAnchor{userID: "@bot:test", masterKey: "our master key", userSigningKey: ours}
	without := trustAnchor{userID: "@bot:test"}
	pinned := func(key id.Ed25519) trustAnchor {
		a := anchor
		a.pins = map[id.UserID]id.Ed25519{"@alice:test": key}
		return a
	}
	alice := func(change func(*Identity)) *Identity {
		i := &Identity{UserID: "@alice:test", MasterKey: "M1", FirstMasterKey: "M1", SelfSigningKey: "S1"}
		if change != nil {
			change(i)
		}
		return i
	}
	own := func(key id.Ed25519) *Identity {
		return &Identity{UserID: "@bot:test", MasterKey: key, FirstMasterKey: key}
	}
	for _, tc := range []struct {
		name     string
		anchor   trustAnchor
		identity *Identity
		want     Standing
	}{
		{"nothing known", anchor, nil, StandingUnverified},
		{"no master key", anchor, &Identity{UserID: "@alice:test"}, StandingUnverified},
		{"never verified", anchor, alice(nil), StandingUnverified},
		{"never verified, reset", anchor, alice(func(i *Identity) { i.MasterKey = "M2" }), StandingUnverified},
		{"verified", anchor, alice(func(i *Identity) { i.VerifiedBy, i.WasVerified = ours, true }), StandingVerified},
		{"verified, reset", anchor, alice(func(i *Identity) { i.MasterKey, i.WasVerified = "M2", true }), StandingViolation},
		{"verified again after a reset", anchor, alice(func(i *Identity) { i.MasterKey, i.VerifiedBy, i.WasVerified = "M2", ours, true }), StandingVerified},
		{"verified by a key that we had before", anchor, alice(func(i *Identity) { i.VerifiedBy, i.WasVerified = formerly, true }), StandingUnverified},
		{"verified, and our own keys are gone", without, alice(func(i *Identity) { i.VerifiedBy, i.WasVerified = ours, true }), StandingUnverified},
		{"never verified, and we have no keys", without, alice(nil), StandingUnverified},
		{"pinned, not signed yet", pinned("M1"), alice(nil), StandingUnverified},
		{"pinned and signed", pinned("M1"), alice(func(i *Identity) { i.VerifiedBy, i.WasVerified = ours, true }), StandingVerified},
		{"pinned to another key", pinned("M2"), alice(nil), StandingViolation},
		{"pinned to another key than the signed one", pinned("M2"), alice(func(i *Identity) { i.VerifiedBy, i.WasVerified = ours, true }), StandingViolation},
		{"pinned, and no master key published", pinned("M1"), &Identity{UserID: "@alice:test"}, StandingUnverified},
		{"ourselves", anchor, own("our master key"), StandingVerified},
		{"ourselves with another master key", anchor, own("a server's invention"), StandingViolation},
		{"ourselves, signed by ourselves, with another master key", anchor, &Identity{UserID: "@bot:test", MasterKey: "x", VerifiedBy: ours, WasVerified: true}, StandingViolation},
		{"ourselves without keys of ours", without, own("somebody's"), StandingUnverified},
	} {
		if got := tc.anchor.judge(tc.identity); got != tc.want {
			t.Errorf("%s: standing %s, want %s", tc.name, got, tc.want)
		}
	}
}

func TestStateOfWhatAnEarlierIdentitySigned(t *testing.T) {
	const ours = id.Ed25519("our user-signing key")
	anchor := trustAnchor{userID: "@bot:test", masterKey: "our master key", userSigningKey: ours}
	identity := func(verifiedBy id.Ed25519, was bool) *Identity {
		return &Identity{UserID: "@alice:test", MasterKey: "M2", FirstMasterKey: "M1", VerifiedBy: verifiedBy, WasVerified: was}
	}
	for _, tc := range []struct {
		name      string
		masterKey id.Ed25519
		identity  *Identity
		want      State
	}{
		{"verified now, signed by the identity of now", "M2", identity(ours, true), StateSenderVerified},
		{"verified now, signed by the earlier one", "M1", identity(ours, true), StateSenderUnverified},
		{"verified once, signed by the identity of now", "M2", identity("", true), StateVerificationViolation},
		{"verified once, signed by the earlier one", "M1", identity("", true), StateVerificationViolation},
		{"never verified", "M1", identity("", false), StateSenderUnverified},
		{"never verified, signed by the identity of now", "M2", identity("", false), StateSenderUnverified},
		{"forgotten", "M1", nil, StateSenderUnverified},
	} {
		if got := anchor.stateOf(tc.masterKey, tc.identity); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

func TestMergeForgetsNothingThatWasVerified(t *testing.T) {
	identity := &Identity{UserID: "@alice:test"}
	steps := []struct {
		name      string
		published publishedIdentity
		withdrawn bool
		want      Identity
	}{
		{"first seen", publishedIdentity{masterKey: "M1", selfSigningKey: "S1"}, false,
			Identity{"@alice:test", "M1", "M1", "S1", "", false, ""}},
		{"verified", publishedIdentity{masterKey: "M1", selfSigningKey: "S1", verifiedBy: "U"}, false,
			Identity{"@alice:test", "M1", "M1", "S1", "U", true, ""}},
		{"the server leaves our signature out", publishedIdentity{masterKey: "M1", selfSigningKey: "S1"}, false,
			Identity{"@alice:test", "M1", "M1", "S1", "U", true, ""}},
		{"the self-signing key is rotated", publishedIdentity{masterKey: "M1", selfSigningKey: "S2"}, false,
			Identity{"@alice:test", "M1", "M1", "S2", "U", true, ""}},
		{"the server leaves the self-signing key out", publishedIdentity{masterKey: "M1"}, false,
			Identity{"@alice:test", "M1", "M1", "S2", "U", true, ""}},
		{"reset", publishedIdentity{masterKey: "M2", selfSigningKey: "S3"}, false,
			Identity{"@alice:test", "M2", "M1", "S3", "", true, ""}},
		{"the first one again, without our signature", publishedIdentity{masterKey: "M1", selfSigningKey: "S1"}, false,
			Identity{"@alice:test", "M1", "M1", "S1", "", true, ""}},
		{"reset, without a self-signing key", publishedIdentity{masterKey: "M2"}, false,
			Identity{"@alice:test", "M2", "M1", "", "", true, ""}},
		{"verified again", publishedIdentity{masterKey: "M3", selfSigningKey: "S4", verifiedBy: "U2"}, false,
			Identity{"@alice:test", "M3", "M1", "S4", "U2", true, ""}},
		{"a signature that was withdrawn", publishedIdentity{masterKey: "M1", selfSigningKey: "S1", verifiedBy: "U"}, true,
			Identity{"@alice:test", "M1", "M1", "S1", "", true, ""}},
	}
	for _, step := range steps {
		identity.merge(&step.published, step.withdrawn)
		if *identity != step.want {
			t.Errorf("%s: %+v, want %+v", step.name, *identity, step.want)
		}
	}
}

func TestOnlyPinnedKeysAreSigned(t *testing.T) {
	anchor := trustAnchor{userID: "@bot:test", userSigningKey: "U", pins: map[id.UserID]id.Ed25519{"@alice:test": "M1", "@bot:test": "M1"}}
	for name, tc := range map[string]struct {
		identity *Identity
		want     bool
	}{
		"pinned":               {&Identity{UserID: "@alice:test", MasterKey: "M1"}, true},
		"pinned to another":    {&Identity{UserID: "@alice:test", MasterKey: "M2"}, false},
		"not pinned":           {&Identity{UserID: "@eve:test", MasterKey: "M1"}, false},
		"ourselves":            {&Identity{UserID: "@bot:test", MasterKey: "M1"}, false},
		"signed already":       {&Identity{UserID: "@alice:test", MasterKey: "M1", VerifiedBy: "U"}, false},
		"signed by our former": {&Identity{UserID: "@alice:test", MasterKey: "M1", VerifiedBy: "U0"}, true},
		"without a key":        {&Identity{UserID: "@alice:test"}, false},
		"unknown":              {nil, false},
	} {
		if got := anchor.needsSignature(tc.identity); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if (trustAnchor{userID: "@bot:test", pins: anchor.pins}).needsSignature(&Identity{UserID: "@alice:test", MasterKey: "M1"}) {
		t.Error("signs without a user-signing key")
	}
}

// What is noted as a device's signers stays evidence for ever.
func TestOnlyValidSignaturesAreNoted(t *testing.T) {
	w := newIdentityWorld()
	device := w.alice.addDevice("DEVICE")
	all, none := func(id.Ed25519) bool { return true }, func(id.Ed25519) bool { return false }
	for name, tc := range map[string]struct {
		genuine int
		other   func(keys object)
		asked   func(id.Ed25519) bool
		want    int
	}{
		"somebody":                 {genuine: 1, want: 1, asked: all},
		"somebody who is noted":    {genuine: 1, want: 0, asked: none},
		"as many as are looked at": {genuine: maxSigners, want: maxSigners, asked: all},
		"more than are looked at":  {genuine: maxSigners + 1, want: maxSigners, asked: all},
		"a forged signature": {want: 0, asked: all, other: func(keys object) {
			putSignature(keys, w.alice.userID, w.alice.selfSigningKey().String(), forgedSignature())
		}},
		"in the name of no key": {want: 0, asked: all, other: func(keys object) {
			signInto(keys, w.alice.userID, "OTHER", w.alice.selfSigning)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			keys := device.selfSignedKeys()
			var genuine []id.Ed25519
			for range tc.genuine {
				signer := must(olm.NewPKSigning())
				signInto(keys, w.alice.userID, signer.PublicKey().String(), signer)
				genuine = append(genuine, signer.PublicKey())
			}
			if tc.other != nil {
				tc.other(keys)
			}
			slices.Sort(genuine)
			raw := rawJSON(keys)
			parsed := must(parseDeviceKeys(raw, w.alice.userID, "DEVICE"))
			if got := validSigners(raw, parsed, "", tc.asked); !slices.Equal(got, genuine[:tc.want]) {
				t.Errorf("noted %v, want %v", got, genuine[:tc.want])
			}
		})
	}
}

// Somebody who has reset their identity often, and whose devices bear the signatures of all their keys, is known by today's.
func TestSignatureThatMattersIsLookedAtFirst(t *testing.T) {
	w := newIdentityWorld()
	device := w.alice.addDevice("DEVICE")
	keys := device.selfSignedKeys()
	var last id.Ed25519
	for range 2 * maxSigners {
		signer := must(olm.NewPKSigning())
		signInto(keys, w.alice.userID, signer.PublicKey().String(), signer)
		last = max(last, signer.PublicKey())
	}
	raw := rawJSON(keys)
	valid := validSigners(raw, must(parseDeviceKeys(raw, w.alice.userID, "DEVICE")), last, func(id.Ed25519) bool { return true })
	if len(valid) != maxSigners || valid[0] != last {
		t.Errorf("looked at are %v, not %s at first", valid, last)
	}
}

// A key that is no point of the curve, or of small order, would verify anything.
func TestWeakKeysSignNothing(t *testing.T) {
	userID := id.UserID("@alice:test")
	signer := must(olm.NewPKSigning())
	for _, weak := range []id.Ed25519{"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "", "QQ", "not base64"} {
		signed := object{"user_id": userID.String()}
		// S = 0 and R = the neutral element: valid for a key of order one under lax verification.
		putSignature(signed, userID, weak.String(), "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
		signInto(signed, userID, "other", signer)
		if signedBy(rawJSON(signed), userID, weak) {
			t.Errorf("the key %q signs", weak)
		}
	}
}

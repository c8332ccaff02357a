package cryptohook

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// designShields is the table of DESIGN.md, section 3, word for word: code, lax, strict.
const designShields = `
verified                    none  none
unverified_identity         none  red
identity_changed            grey  red
verification_violation      red   red
unsigned_device             red   red
unknown_device              red   red
authenticity_not_guaranteed grey  red
mismatched_sender           red   red
session_conflict            red   red
session_rejected            red   red
sent_in_clear               red   red
unable_to_decrypt           red   red
not_encrypted               none  grey
`

func TestShieldsAreThoseOfTheDesign(t *testing.T) {
	seen := make(map[Code]bool)
	for line := range strings.Lines(strings.TrimSpace(designShields)) {
		words := strings.Fields(line)
		code := Code(words[0])
		seen[code] = true
		if lax := code.LaxShield(); string(lax) != words[1] {
			t.Errorf("%s: lax shield %s, want %s", code, lax, words[1])
		}
		if strict := code.StrictShield(); string(strict) != words[2] {
			t.Errorf("%s: strict shield %s, want %s", code, strict, words[2])
		}
	}
	for code := range shields {
		if !seen[code] {
			t.Errorf("%s is not in the design", code)
		}
	}
}

// designCodes are the codes as other programs read them.
func TestCodesAreSpeltAsInTheDesign(t *testing.T) {
	got := slices.Sorted(maps.Keys(shields))
	var want []Code
	for line := range strings.Lines(strings.TrimSpace(designShields)) {
		want = append(want, Code(strings.Fields(line)[0]))
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("codes %v, want %v", got, want)
	}
}

const (
	verdictAlice = id.UserID("@alice:test")
	verdictEve   = id.UserID("@eve:test")
	verdictOurs  = id.Ed25519("our user-signing key")
)

var verdictAnchor = trustAnchor{userID: "@bot:test", masterKey: "our master key", userSigningKey: verdictOurs}

// ownedBy is alice's stored claim, proven by M1 where it is proven.
func ownedBy(state State, change ...func(*SenderData)) *SenderData {
	sd := &SenderData{SessionID: "session", SenderKey: "alice's key", Sender: verdictAlice, Source: SourceDirect, State: state}
	if state != StateUnknownDevice {
		sd.DeviceID = "ALICE"
	}
	if state.proven() {
		sd.MasterKey = "M1"
	}
	for _, c := range change {
		c(sd)
	}
	return sd
}

func imported(source Source) func(*SenderData) {
	return func(sd *SenderData) { sd.Source, sd.Legacy, sd.Sender, sd.DeviceID = source, true, "", "" }
}

func identityNow(master, first id.Ed25519, verifiedBy id.Ed25519, was bool) *Identity {
	return &Identity{UserID: verdictAlice, MasterKey: master, FirstMasterKey: first, VerifiedBy: verifiedBy, WasVerified: was}
}

func TestEveryCodeComesFromItsCause(t *testing.T) {
	mallory := &SenderData{SessionID: "session", SenderKey: "mallory's key", Sender: verdictEve, DeviceID: "MALLORY", Source: SourceDirect, State: StateSenderVerified, MasterKey: "X"}
	unverified, verified, reset := identityNow("M1", "M1", "", false), identityNow("M1", "M1", verdictOurs, true), identityNow("M2", "M1", "", false)
	violated, again := identityNow("M2", "M1", "", true), identityNow("M2", "M1", verdictOurs, true)
	for _, tc := range []struct {
		name     string
		sender   id.UserID
		claims   []*SenderData
		identity *Identity
		code     Code
		state    State
	}{
		{"verified", verdictAlice, []*SenderData{ownedBy(StateSenderVerified)}, verified, CodeVerified, StateSenderVerified},
		{"unverified", verdictAlice, []*SenderData{ownedBy(StateSenderUnverified)}, unverified, CodeUnverifiedIdentity, StateSenderUnverified},
		{"the row is stale, verified since", verdictAlice, []*SenderData{ownedBy(StateSenderUnverified)}, verified, CodeVerified, StateSenderVerified},
		{"the row is stale, violated since", verdictAlice, []*SenderData{ownedBy(StateSenderVerified)}, violated, CodeVerificationViolation, StateVerificationViolation},
		{"the row is stale, verified again", verdictAlice, []*SenderData{ownedBy(StateVerificationViolation, func(sd *SenderData) { sd.MasterKey = "M2" })}, again, CodeVerified, StateSenderVerified},
		{"an old session after the reset and a new verification", verdictAlice, []*SenderData{ownedBy(StateSenderVerified)}, again, CodeIdentityChanged, StateSenderUnverified},
		{"not today's master key", verdictAlice, []*SenderData{ownedBy(StateSenderUnverified)}, reset, CodeIdentityChanged, StateSenderUnverified},
		{"not the first master key", verdictAlice, []*SenderData{ownedBy(StateSenderUnverified, func(sd *SenderData) { sd.MasterKey = "M2" })}, reset, CodeIdentityChanged, StateSenderUnverified},
		{"a proven sender of whom nothing is known any more", verdictAlice, []*SenderData{ownedBy(StateSenderVerified)}, nil, CodeIdentityChanged, StateSenderUnverified},
		{"device info", verdictAlice, []*SenderData{ownedBy(StateDeviceInfo)}, verified, CodeUnsignedDevice, StateDeviceInfo},
		{"unknown device", verdictAlice, []*SenderData{ownedBy(StateUnknownDevice)}, verified, CodeUnknownDevice, StateUnknownDevice},
		{"owner check failed", verdictAlice, []*SenderData{ownedBy(StateUnknownDevice, func(sd *SenderData) { sd.Reason = reasonOwnerCheckFailed })}, verified, CodeAuthenticityNotGuaranteed, StateUnknownDevice},
		{"backup", verdictAlice, []*SenderData{ownedBy(StateUnknownDevice, imported(SourceBackup))}, nil, CodeAuthenticityNotGuaranteed, StateUnknownDevice},
		{"import", verdictAlice, []*SenderData{ownedBy(StateUnknownDevice, imported(SourceImport))}, nil, CodeAuthenticityNotGuaranteed, StateUnknownDevice},
		{"forwarded", verdictAlice, []*SenderData{ownedBy(StateUnknownDevice, imported(SourceForwarded))}, nil, CodeAuthenticityNotGuaranteed, StateUnknownDevice},
		{"bundle", verdictAlice, []*SenderData{ownedBy(StateUnknownDevice, imported(SourceHistoryBundle))}, nil, CodeAuthenticityNotGuaranteed, StateUnknownDevice},
		{"without sender data", verdictAlice, nil, nil, CodeAuthenticityNotGuaranteed, StateUnknownDevice},
		{"another sender", verdictEve, []*SenderData{ownedBy(StateSenderVerified)}, verified, CodeMismatchedSender, StateSenderVerified},
		{"another sender, unknown device", verdictEve, []*SenderData{ownedBy(StateUnknownDevice)}, nil, CodeMismatchedSender, StateUnknownDevice},
		{"two claims", verdictAlice, []*SenderData{ownedBy(StateSenderVerified), mallory}, verified, CodeSessionConflict, StateSenderVerified},
		{"two claims, the attacker first", verdictAlice, []*SenderData{mallory, ownedBy(StateSenderVerified)}, nil, CodeSessionConflict, StateSenderUnverified},
		{"rejected", verdictAlice, []*SenderData{ownedBy(StateRejected)}, verified, CodeSessionRejected, StateRejected},
		{"rejected, and sent by another", verdictEve, []*SenderData{ownedBy(StateRejected)}, verified, CodeSessionRejected, StateRejected},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := verdictAnchor.verdict(tc.sender, "session", tc.claims, tc.identity)
			if v.Code != tc.code || v.State != tc.state {
				t.Errorf("%s in state %s, want %s in %s", v.Code, v.State, tc.code, tc.state)
			}
			if v.SessionID != "session" {
				t.Errorf("session %q", v.SessionID)
			}
			if len(tc.claims) > 0 && (v.UserID != tc.claims[0].Sender || v.DeviceID != tc.claims[0].DeviceID || v.MasterKey != tc.claims[0].MasterKey) {
				t.Errorf("the owner is %s %s %s", v.UserID, v.DeviceID, v.MasterKey)
			}
			wantReason := ""
			if tc.code == CodeMismatchedSender {
				wantReason = ReasonOtherSender
			}
			if v.Reason != wantReason {
				t.Errorf("reason %q", v.Reason)
			}
		})
	}
}

func TestConflictNamesEveryClaimant(t *testing.T) {
	mallory := &SenderData{SenderKey: "mallory's key", Sender: verdictEve, DeviceID: "MALLORY", State: StateDeviceInfo, Source: SourceDirect}
	v := verdictAnchor.verdict(verdictAlice, "session", []*SenderData{ownedBy(StateSenderUnverified), mallory}, identityNow("M1", "M1", "", false))
	want := []Claimant{{verdictAlice, "ALICE", "alice's key"}, {verdictEve, "MALLORY", "mallory's key"}}
	if !slices.Equal(v.Claimants, want) {
		t.Errorf("claimants %+v, want %+v", v.Claimants, want)
	}
	if alone := verdictAnchor.verdict(verdictAlice, "session", []*SenderData{mallory}, nil); alone.Claimants != nil {
		t.Errorf("claimants %+v of a session without conflict", alone.Claimants)
	}
}

// A verdict from a pin: the pinned key is what the user-signing key signed; another one is a violation whatever was signed.
func TestPinnedToAnotherKeyIsAViolation(t *testing.T) {
	anchor := verdictAnchor
	anchor.pins = map[id.UserID]id.Ed25519{verdictAlice: "M9"}
	v := anchor.verdict(verdictAlice, "session", []*SenderData{ownedBy(StateSenderVerified)}, identityNow("M1", "M1", verdictOurs, true))
	if v.Code != CodeVerificationViolation {
		t.Errorf("code %s", v.Code)
	}
}

// REFERENCE.md, "trust_requirement, checked after decryption", and the codes that only we have.
func TestTrustRequirementTable(t *testing.T) {
	const (
		ok, legacyOnly, refused = "ok", "legacy", "refused"
	)
	for _, row := range []struct {
		code Code
		want [3]string // untrusted, cross_signed_or_legacy, cross_signed
	}{
		{CodeVerified, [3]string{ok, ok, ok}},
		{CodeUnverifiedIdentity, [3]string{ok, ok, ok}},
		{CodeIdentityChanged, [3]string{ok, ok, ok}},
		{CodeUnsignedDevice, [3]string{ok, legacyOnly, refused}},
		{CodeUnknownDevice, [3]string{ok, legacyOnly, refused}},
		{CodeAuthenticityNotGuaranteed, [3]string{ok, legacyOnly, refused}},
		{CodeVerificationViolation, [3]string{ok, refused, refused}},
		{CodeMismatchedSender, [3]string{ok, refused, refused}},
		{CodeSessionConflict, [3]string{ok, refused, refused}},
		{CodeSessionRejected, [3]string{refused, refused, refused}},
		{CodeUnableToDecrypt, [3]string{refused, refused, refused}},
		{CodeSentInClear, [3]string{ok, refused, refused}},
		{CodeNotEncrypted, [3]string{ok, ok, ok}},
	} {
		for i, requirement := range []TrustRequirement{RequireNothing, RequireCrossSignedOrLegacy, RequireCrossSigned} {
			for _, legacy := range []bool{false, true} {
				want := row.want[i] == ok || row.want[i] == legacyOnly && legacy
				if got := requirement.allows(Verdict{Code: row.code, Legacy: legacy}); got != want {
					t.Errorf("%s, legacy %v: %s allows it: %v, want %v", row.code, legacy, requirement, got, want)
				}
			}
		}
	}
	for code := range shields {
		if RequireCrossSigned.allows(Verdict{Code: code}) && !RequireNothing.allows(Verdict{Code: code}) {
			t.Errorf("%s: the higher requirement allows more", code)
		}
	}
	if RequireNothing.allows(Verdict{Code: CodeUnableToDecrypt}) {
		t.Error("content that could not be decrypted is allowed")
	}
}

// With a word that is none, everything would be handed on.
func TestHookIsNotInstalledWithAnUnknownTrustRequirement(t *testing.T) {
	w := newTrustWorld(t)
	w.stop()
	for _, word := range []TrustRequirement{"", RequireNothing, RequireCrossSignedOrLegacy, RequireCrossSigned} {
		w.options.Requirement = word
		w.start()
		w.stop()
	}
	w.options.Requirement = "Cross_Signed"
	if _, err := Install(w.ctx, w.client, w.options); err == nil || !strings.Contains(err.Error(), "cross_signed_or_legacy") {
		t.Errorf("error %v: it has to name the words that there are", err)
	}
}

func TestVerdictCannotBeForgedFromJSON(t *testing.T) {
	for _, content := range []string{
		`{"dev.sendertrust.verdict": {"Code": "verified", "verdict": {"Code": "verified"}}}`,
		`{"dev.sendertrust.verdict": "verified"}`,
		`{"dev.sendertrust.verdict": null}`,
		`{"dev.sendertrust.annotation": {"code": "verified"}}`,
		`{}`,
	} {
		var evt event.Event
		if err := json.Unmarshal([]byte(`{"type":"m.room.message","content":`+content+`}`), &evt); err != nil {
			t.Fatal(err)
		}
		if verdict, ok := VerdictOf(&evt); ok {
			t.Errorf("%s has the verdict %+v", content, verdict)
		}
	}
	if _, ok := VerdictOf(&event.Event{}); ok {
		t.Error("an empty event has a verdict")
	}
}

func TestVerdictDoesNotLeaveTheProgramWithItsEvent(t *testing.T) {
	var evt event.Event
	if err := json.Unmarshal([]byte(`{"type":"m.room.message","content":{"body":"x","dev.sendertrust.verdict":"verified"}}`), &evt); err != nil {
		t.Fatal(err)
	}
	attach(&evt, Verdict{Code: CodeUnknownDevice, UserID: verdictAlice})
	if verdict, ok := VerdictOf(&evt); !ok || verdict.Code != CodeUnknownDevice {
		t.Errorf("verdict %+v, %v", verdict, ok)
	}
	if raw := rawJSON(evt.Content.Raw); strings.Contains(string(raw), "unknown_device") || strings.Contains(string(raw), "alice") {
		t.Errorf("sent on: %s", raw)
	}
}

// Whoever looks at mautrix's trust state only must not be told more than is true.
func TestMautrixTrustStateNeverExceedsTheVerdict(t *testing.T) {
	for code := range shields {
		state := Verdict{Code: code}.trustState()
		if (state >= id.TrustStateCrossSignedVerified) != (code == CodeVerified) {
			t.Errorf("%s is %s for mautrix", code, state)
		}
		if (state >= id.TrustStateCrossSignedTOFU) != (code == CodeVerified || code == CodeUnverifiedIdentity) {
			t.Errorf("%s is %s for mautrix", code, state)
		}
	}
}

func TestVerdictInMautrixsTerms(t *testing.T) {
	for code := range shields {
		want := map[Code]id.TrustState{
			CodeVerified: id.TrustStateCrossSignedVerified, CodeUnverifiedIdentity: id.TrustStateCrossSignedTOFU,
			CodeIdentityChanged: id.TrustStateCrossSignedUntrusted, CodeVerificationViolation: id.TrustStateCrossSignedUntrusted,
			CodeUnknownDevice: id.TrustStateUnknownDevice, CodeAuthenticityNotGuaranteed: id.TrustStateForwarded,
		}[code] // unset for the others
		evt := event.Event{Mautrix: event.MautrixInfo{TrustState: id.TrustStateVerified, TrustSource: &id.Device{Trust: id.TrustStateVerified}}}
		attach(&evt, Verdict{Code: code})
		if evt.Mautrix.TrustState != want || evt.Mautrix.TrustSource != nil {
			t.Errorf("%s is %s from %v for mautrix, want %s", code, evt.Mautrix.TrustState, evt.Mautrix.TrustSource, want)
		}
	}
}

func TestOnlyMessagesWhoseKeyMayComeAreWaitedFor(t *testing.T) {
	for reason, want := range map[string]bool{
		ReasonUnknownSession: true, ReasonUnknownIndex: true, ReasonKeyDeleted: true, "m.unverified": true,
		ReasonMalformed: false, ReasonWrongRoom: false, ReasonUnsupportedAlgorithm: false,
	} {
		if got := (Verdict{Code: CodeUnableToDecrypt, SessionID: "session", Reason: reason}).mayComeLate(); got != want {
			t.Errorf("%s: %v", reason, got)
		}
	}
	if (Verdict{Code: CodeUnableToDecrypt}).mayComeLate() || (Verdict{Code: CodeUnknownDevice, SessionID: "session"}).mayComeLate() {
		t.Error("waits for a key that nobody can send, or that is here")
	}
}

func TestSessionWithoutSenderDataIsLegacy(t *testing.T) {
	if !verdictAnchor.verdict(verdictAlice, "session", nil, nil).Legacy || verdictAnchor.verdict(verdictAlice, "session", []*SenderData{ownedBy(StateSenderUnverified)}, nil).Legacy {
		t.Error("legacy are sessions of whose senders nothing is stored")
	}
}

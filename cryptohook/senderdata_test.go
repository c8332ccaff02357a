package cryptohook

import (
	"testing"

	"maunium.net/go/mautrix/id"
)

func TestTrustOrder(t *testing.T) {
	order := []State{StateRejected, StateUnknownDevice, StateDeviceInfo, StateVerificationViolation, StateSenderUnverified, StateSenderVerified}
	for i, state := range order[1:] {
		if state.rank() <= order[i].rank() {
			t.Errorf("%s is not above %s", state, order[i])
		}
		if state.proven() != (i >= 2) {
			t.Errorf("%s: proven is %v", state, state.proven())
		}
	}
	if StateRejected.proven() || State("").proven() {
		t.Error("what was rejected counts as proven")
	}
}

// claimOf is a claim as it arrives or is stored; the device ID tells which of two a merge took.
func claimOf(state State, source Source, deviceID id.DeviceID) *SenderData {
	return &SenderData{SessionID: "s", SenderKey: "k", State: state, Source: source, DeviceID: deviceID, Legacy: source != SourceDirect}
}

// REFERENCE.md, "a session that exists already": what matters here is the sender data; the ratchet is mautrix's.
func TestMergeKeepsTheMoreTrustedSenderData(t *testing.T) {
	states := []State{StateUnknownDevice, StateDeviceInfo, StateVerificationViolation, StateSenderUnverified, StateSenderVerified}
	for i, old := range states {
		for j, arrives := range states {
			stored, arrived := claimOf(old, SourceDirect, "STORED"), claimOf(arrives, SourceDirect, "ARRIVED")
			got := mergeSenderData(stored, arrived)
			if want := stored; j < i {
				if got != want {
					t.Errorf("%s arrives on %s: took the less trusted one", arrives, old)
				}
			}
			if want := arrived; j > i {
				if got != want {
					t.Errorf("%s arrives on %s: kept the less trusted one", arrives, old)
				}
			}
			if got.State.rank() < max(stored.State.rank(), arrived.State.rank()) {
				t.Errorf("%s arrives on %s: trust is lost", arrives, old)
			}
		}
	}
	if arrived := claimOf(StateUnknownDevice, SourceDirect, "ARRIVED"); mergeSenderData(nil, arrived) != arrived {
		t.Error("the first claim is not taken")
	}
}

// The reference's fault: a merge at equal trust lets an imported key replace one received directly.
func TestImportedSenderDataNeverReplacesDirect(t *testing.T) {
	for _, source := range []Source{SourceForwarded, SourceBackup, SourceImport, SourceHistoryBundle} {
		for _, state := range []State{StateUnknownDevice, StateDeviceInfo, StateVerificationViolation, StateSenderUnverified, StateSenderVerified, StateRejected} {
			stored, arrived := claimOf(state, SourceDirect, "STORED"), claimOf(StateUnknownDevice, source, "ARRIVED")
			if got := mergeSenderData(stored, arrived); got != stored {
				t.Errorf("%s replaces a direct %s", source, state)
			}
		}
	}
}

func TestDirectSenderDataReplacesImported(t *testing.T) {
	for _, source := range []Source{SourceForwarded, SourceBackup, SourceImport, SourceHistoryBundle} {
		for _, state := range []State{StateUnknownDevice, StateDeviceInfo, StateVerificationViolation, StateSenderUnverified, StateSenderVerified} {
			stored, arrived := claimOf(StateUnknownDevice, source, "STORED"), claimOf(state, SourceDirect, "ARRIVED")
			if got := mergeSenderData(stored, arrived); got != arrived || got.Legacy {
				t.Errorf("a direct %s does not replace %s", state, source)
			}
		}
	}
}

func TestOnlyProofUndoesARejection(t *testing.T) {
	for _, state := range []State{StateUnknownDevice, StateDeviceInfo, StateRejected} {
		stored := claimOf(StateRejected, SourceDirect, "STORED")
		if got := mergeSenderData(stored, claimOf(state, SourceDirect, "ARRIVED")); got.State != StateRejected {
			t.Errorf("%s undoes a rejection", state)
		}
	}
	for _, state := range []State{StateVerificationViolation, StateSenderUnverified, StateSenderVerified} {
		arrived := claimOf(state, SourceDirect, "ARRIVED")
		if got := mergeSenderData(claimOf(StateRejected, SourceDirect, "STORED"), arrived); got != arrived {
			t.Errorf("%s does not undo a rejection", state)
		}
	}
}

func TestAForgedCopyCannotTakeAwayWhatWasProven(t *testing.T) {
	forged := claimOf(StateRejected, SourceDirect, "ARRIVED")
	for _, state := range []State{StateVerificationViolation, StateSenderUnverified, StateSenderVerified} {
		if stored := claimOf(state, SourceDirect, "STORED"); mergeSenderData(stored, forged) != stored {
			t.Errorf("a forged copy takes %s away", state)
		}
	}
	for _, state := range []State{StateUnknownDevice, StateDeviceInfo} {
		if mergeSenderData(claimOf(state, SourceDirect, "STORED"), forged) != forged {
			t.Errorf("a forged copy does not condemn %s", state)
		}
	}
}

func TestLivingClaims(t *testing.T) {
	rejected, alice, bob := claimOf(StateRejected, SourceDirect, "R"), claimOf(StateDeviceInfo, SourceDirect, "A"), claimOf(StateSenderVerified, SourceDirect, "B")
	for name, tc := range map[string]struct{ claims, want []*SenderData }{
		"none":                            {nil, nil},
		"one":                             {[]*SenderData{alice}, []*SenderData{alice}},
		"a forger casts no doubt":         {[]*SenderData{rejected, alice}, []*SenderData{alice}},
		"whoever comes first":             {[]*SenderData{alice, rejected}, []*SenderData{alice}},
		"two living ones, in their order": {[]*SenderData{bob, rejected, alice}, []*SenderData{bob, alice}},
		"nobody but forgers":              {[]*SenderData{rejected, claimOf(StateRejected, SourceDirect, "R2")}, []*SenderData{rejected}},
	} {
		got := livingClaims(tc.claims)
		if len(got) != len(tc.want) {
			t.Errorf("%s: %d claims, want %d", name, len(got), len(tc.want))
			continue
		}
		for i := range got {
			if got[i] != tc.want[i] {
				t.Errorf("%s: claim %d is %s", name, i, got[i].DeviceID)
			}
		}
	}
}

func TestEverySourceOfMautrixHasAName(t *testing.T) {
	for source, want := range map[id.KeySource]Source{
		id.KeySourceDirect: SourceDirect, id.KeySourceForward: SourceForwarded, id.KeySourceBackup: SourceBackup,
		id.KeySourceImport: SourceImport, "": SourceImport, "a new way": SourceImport,
	} {
		if got := sourceOf(source); got != want {
			t.Errorf("%q is %q, want %q", source, got, want)
		}
	}
}

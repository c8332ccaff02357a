package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

func (w *trustWorld) user(userID id.UserID) *UserReport {
	w.t.Helper()
	report := must(w.hook.User(w.ctx, userID))
	if report == nil {
		w.t.Fatalf("nothing is known of %s", userID)
	}
	w.agreeOnStanding(report)
	return report
}

// agreeOnStanding sees that the table of many says what the report of one does.
func (w *trustWorld) agreeOnStanding(report *UserReport) {
	w.t.Helper()
	want := UserStanding{
		UserID: report.UserID, Known: report.MasterKey != "" || len(report.Devices) > 0, Standing: report.Standing, MasterKey: report.MasterKey,
		Changed: report.MasterKey != report.FirstMasterKey, Outdated: report.Outdated,
	}
	for _, device := range report.Devices {
		switch {
		case device.Deleted:
		case device.SignedByOwner:
			want.Signed++
		default:
			want.Unsigned++
		}
	}
	if got := must(w.hook.Standings(w.ctx, []id.UserID{report.UserID}))[report.UserID]; got != want {
		w.t.Errorf("the table says %+v, and the report %+v", got, want)
	}
}

func TestUserIsReportedWithDevicesAndHistory(t *testing.T) {
	w, alice, _ := twoPeople(t)
	first, began := alice.owner.masterKey(), w.clock.Now()
	gone, unsigned := alice.owner.addDevice("GONE"), alice.owner.addDevice("UNSIGNED")
	unsigned.crossSigned = false
	w.server.forge = func(answer object) {
		if devices, asked := answer["device_keys"].(object)["@alice:test"].(object); asked {
			devices["UNSIGNED"].(object)["unsigned"] = object{"device_display_name": "a phone"}
		}
	}
	w.know(alice.owner)
	gone.unpublished = true
	w.clock.advance(time.Hour)
	w.know(alice.owner)
	report := w.user("@alice:test")
	want := &UserReport{
		UserID: "@alice:test", MasterKey: first, FirstMasterKey: first, SelfSigningKey: alice.owner.selfSigningKey(), Standing: StandingUnverified,
		FirstSeen: began, Changes: []IdentityChange{{first, began}},
		Devices: []DeviceReport{
			{"ALICE", "", alice.signingKey(), true, false}, {"UNSIGNED", "a phone", unsigned.signingKey(), false, false}, {"GONE", "", gone.signingKey(), true, true},
		},
	}
	if string(rawJSON(report)) != string(rawJSON(want)) {
		t.Errorf("report %s\nwant   %s", rawJSON(report), rawJSON(want))
	}
	alice.owner.reset()
	w.know(alice.owner)
	report = w.user("@alice:test")
	if !report.FirstSeen.Equal(began) || report.FirstMasterKey != first || len(report.Changes) != 2 ||
		report.Changes[1].MasterKey != alice.owner.masterKey() || !report.Changes[1].SeenAt.Equal(began.Add(time.Hour)) {
		t.Errorf("after a reset: %+v", report)
	}
	w.sync(syncPart{changed: []id.UserID{"@alice:test"}})
	if !w.user("@alice:test").Outdated {
		t.Error("the device list is out of date")
	}
	if report := must(w.hook.User(w.ctx, "@nobody:test")); report != nil {
		t.Errorf("of nobody %+v is known", report)
	}
	if standing := must(w.hook.Standings(w.ctx, []id.UserID{"@nobody:test"}))["@nobody:test"]; standing.Known || standing.Standing != StandingUnverified {
		t.Errorf("nobody is %+v", standing)
	}
}

func TestReportSaysWhatMakesAUserVerified(t *testing.T) {
	pins := make(map[id.UserID]id.Ed25519)
	w, alice, mallory := twoPeople(t, func(o *Options) { o.VerifiedUsers = pins })
	check := func(when string, standing Standing, by string, pinned, withdrawn bool) {
		t.Helper()
		report := w.user("@alice:test")
		if report.Standing != standing || report.VerifiedBy != by || report.Pinned != pinned || report.Withdrawn != withdrawn {
			t.Errorf("%s: %+v", when, report)
		}
	}
	check("at first", StandingUnverified, "", false, false)
	if err := w.hook.Verify(w.ctx, "@alice:test", alice.owner.masterKey()); err != nil {
		t.Fatal(err)
	}
	check("verified", StandingVerified, VerifiedBySignature, false, false)
	if err := w.hook.WithdrawVerification(w.ctx, "@alice:test"); err != nil {
		t.Fatal(err)
	}
	check("withdrawn", StandingUnverified, "", false, true)
	pins["@alice:test"] = alice.owner.masterKey()
	w.restart()
	if err := w.hook.Recheck(w.ctx, []id.UserID{"@alice:test"}); err != nil {
		t.Fatal(err)
	}
	check("pinned", StandingVerified, VerifiedByPin, true, false)
	pins["@alice:test"] = mallory.owner.masterKey()
	w.restart()
	check("pinned to another key", StandingViolation, "", true, true)
	if report := w.user("@alice:test"); report.PinnedKey != mallory.owner.masterKey() {
		t.Errorf("pinned to %s", report.PinnedKey)
	}
}

// Whoever makes up one identity after the other fills nothing. The first one and today's stay known.
func TestHistoryOfAnIdentityIsBounded(t *testing.T) {
	w, alice, _ := twoPeople(t)
	first := alice.owner.masterKey()
	for range MaxIdentityChanges + 5 {
		w.clock.advance(time.Second)
		alice.owner.reset()
		w.know(alice.owner)
	}
	report := w.user("@alice:test")
	if count := len(report.Changes); count > MaxIdentityChanges+1 || count < MaxIdentityChanges {
		t.Errorf("%d identities are remembered", count)
	}
	if report.Changes[0].MasterKey != first || report.FirstSeen.IsZero() || report.Changes[len(report.Changes)-1].MasterKey != alice.owner.masterKey() {
		t.Errorf("remembered %+v", report.Changes)
	}
}

// What is published is kept as it was signed, and what the server leaves out is not forgotten.
func TestIdentitysObjectsAreKeptAsTheyWereSigned(t *testing.T) {
	w, alice, _ := twoPeople(t)
	kept := func() identityKey {
		t.Helper()
		keys := must(w.hook.store.identityKeys(w.ctx, "@alice:test"))
		return keys[len(keys)-1]
	}
	seen := kept()
	if !signedBy(seen.selfSigningObject, "@alice:test", alice.owner.masterKey()) || string(seen.masterObject) != string(rawJSON(alice.owner.masterObject())) {
		t.Errorf("kept %s and %s", seen.masterObject, seen.selfSigningObject)
	}
	alice.owner.verifiedBy = w.bot
	w.server.forge = func(answer object) { delete(answer["self_signing_keys"].(object), "@alice:test") }
	w.know(alice.owner)
	if now := kept(); !signedBy(now.masterObject, w.bot.userID, w.bot.userSigning.PublicKey()) || string(now.selfSigningObject) != string(seen.selfSigningObject) || !now.seenAt.Equal(seen.seenAt) {
		t.Errorf("kept %s and %s", now.masterObject, now.selfSigningObject)
	}
	w.server.forge = nil
	alice.owner.selfSigning = newActor("@alice:test").selfSigning
	w.know(alice.owner)
	if now := kept(); now.selfSigningKey != alice.owner.selfSigningKey() || !strings.Contains(string(now.selfSigningObject), now.selfSigningKey.String()) {
		t.Errorf("after a rotation %s is kept", now.selfSigningObject)
	}
	// What is too long is not kept, and does not stay as it was either.
	alice.owner.selfSigning = newActor("@alice:test").selfSigning
	w.server.forge = func(answer object) {
		long := alice.owner.selfSigningObject()
		long["unsigned"] = object{"padding": strings.Repeat("x", maxEvidence)}
		answer["self_signing_keys"].(object)["@alice:test"] = long
	}
	w.know(alice.owner)
	if now := kept(); now.selfSigningKey != alice.owner.selfSigningKey() || now.selfSigningObject != nil {
		t.Errorf("of a long object %s is kept", now.selfSigningObject)
	}
	w.wantStanding("@alice:test", StandingVerified)
}

// A table of many members takes a few statements, whatever they are.
func TestStandingsOfManyUsersAreReadTogether(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	users := []id.UserID{"@alice:test", "@mallory:test", "@alice:test"}
	for i := range 2*perStatement + 10 {
		users = append(users, id.UserID(fmt.Sprintf("@somebody%d:test", i)))
	}
	standings := must(w.hook.Standings(w.ctx, users))
	if len(standings) != len(users)-1 {
		t.Errorf("%d users are in the answer", len(standings))
	}
	for userID, masterKey := range map[id.UserID]id.Ed25519{"@alice:test": alice.owner.masterKey(), "@mallory:test": mallory.owner.masterKey()} {
		if got := standings[userID]; !got.Known || got.MasterKey != masterKey || got.Signed != 1 {
			t.Errorf("%s: %+v", userID, got)
		}
	}
	if got := must(w.hook.Standings(w.ctx, nil)); len(got) != 0 {
		t.Errorf("of no users: %v", got)
	}
}

func TestRecheckJudgesAllSessionsByTheAnswer(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	late := alice.owner.addDevice("LATE")
	late.crossSigned = false
	w.know(alice.owner)
	unsigned, proven := newMegolm(trustRoom), newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(late, unsigned), w.share(mallory, proven)}})
	w.resolve()
	w.wantState(unsigned, late, StateDeviceInfo)
	late.crossSigned = true
	mallory.owner.verifiedBy = w.bot
	queries := w.server.count("keys/query")
	if err := w.hook.Recheck(w.ctx, []id.UserID{"@mallory:test", "@alice:test", "@alice:test"}); err != nil {
		t.Fatal(err)
	}
	if asked := w.server.count("keys/query") - queries; asked != 1 {
		t.Errorf("the homeserver was asked %d times", asked)
	}
	w.wantState(unsigned, late, StateSenderUnverified)
	w.wantState(proven, mallory, StateSenderVerified)
	if w.hook.resolver.pending("@alice:test") {
		t.Error("verdicts still wait")
	}
	err := w.hook.Recheck(w.ctx, []id.UserID{"@alice:test", "@away:elsewhere.test"})
	if unanswered, ok := errors.AsType[*UnansweredError](err); !ok || !slices.Equal(unanswered.Users, []id.UserID{"@away:elsewhere.test"}) {
		t.Errorf("error %v", err)
	}
	w.server.down = true
	err = w.hook.Recheck(w.ctx, []id.UserID{"@alice:test"})
	if unanswered, ok := errors.AsType[*UnansweredError](err); !ok || len(unanswered.Users) != 1 {
		t.Errorf("error %v", err)
	}
	if err = w.hook.Recheck(w.ctx, nil); err != nil {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(w.ctx)
	cancel()
	if err = w.hook.Recheck(ended, []id.UserID{"@alice:test"}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// A database of version 2 knows whose first and last master key is which, and nothing of when, or as what they were signed.
func TestIdentitiesOfVersion2AreKnownWithoutTheirTimes(t *testing.T) {
	s := upgradedFrom(t, 2, func(exec func(statement string, args ...any)) {
		exec(`INSERT INTO sendertrust_identity VALUES ('@a:test', 'M2', 'M1', 'S2', '', false, '', 5), ('@b:test', '', '', '', '', false, 'P', 5)`)
		exec(`INSERT INTO sendertrust_sender (id, user_id, identity_key, signing_key) VALUES (7, '@a:test', 'k', 'e')`)
		exec(`INSERT INTO sendertrust_signature VALUES (7, 'S2')`)
		exec(`INSERT INTO sendertrust_claim VALUES ('s', 7, '!room', 'direct', false, 'sender_unverified', '', 'D', 'M2', NULL, 0, NULL, 8, 9)`)
	})
	keys := must(s.identityKeys(t.Context(), "@a:test"))
	want := []identityKey{{masterKey: "M1"}, {masterKey: "M2", selfSigningKey: "S2"}}
	if !reflect.DeepEqual(keys, want) {
		t.Errorf("kept %+v", keys)
	}
	if keys = must(s.identityKeys(t.Context(), "@b:test")); len(keys) != 0 {
		t.Errorf("of somebody without an identity %+v is kept", keys)
	}
	claim := must(s.claim(t.Context(), "s", "k"))
	if claim.Embedded.Valid || stepWords(stepsOf(claim, &Identity{MasterKey: "M2"}, nil)) != "A not_recorded, D signed, E identity_known, G signed_by_owner, H signature_valid, J unverified" {
		t.Errorf("claim %+v", claim)
	}
	// The signature's object comes with the next copy of it; the signature is no news for all that is proven by it.
	if _, err := s.putSignature(t.Context(), signature{"@a:test", "k", "e", "S2"}, rawJSON(object{"device": "D"})); err != nil {
		t.Fatal(err)
	}
	if kept := must(s.signedObjects(t.Context(), "@a:test", deviceKeyPair{"k", "e"})); string(kept["S2"]) != `{"device":"D"}` {
		t.Errorf("kept %s", kept)
	}
	if _, err := s.putSignature(t.Context(), signature{"@a:test", "k", "e", "S2"}, nil); err != nil {
		t.Fatal(err)
	}
	if kept := must(s.signedObjects(t.Context(), "@a:test", deviceKeyPair{"k", "e"})); kept["S2"] == nil {
		t.Error("the object is lost")
	}
}

// upgradedFrom gives a database that was made as that version made it, filled, and upgraded.
func upgradedFrom(t *testing.T, version int, fill func(exec func(statement string, args ...any))) *store {
	t.Helper()
	at := filepath.Join(t.TempDir(), "old.db")
	if onPostgres {
		at = must(thePostgres(t).NewDatabase(t.Context()))
	}
	db := must(openDatabase("sqlite3-fk-wal", at))
	t.Cleanup(func() { _ = db.Close() })
	old := newStore(db, dbutil.NoopLogger)
	exec := func(statement string, args ...any) {
		t.Helper()
		if _, err := old.Exec(t.Context(), statement, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec(forDialect(old.Dialect, string(must(os.ReadFile(fmt.Sprintf("testdata/schema/v%d.sql", version))))))
	exec("CREATE TABLE " + versionTable + " (version INTEGER, compat INTEGER)")
	exec(fmt.Sprintf("INSERT INTO %s VALUES (%[2]d, %[2]d)", versionTable, version))
	fill(exec)
	if err := old.Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	return old
}

// forDialect leaves out the lines that are marked as the other database's.
func forDialect(dialect dbutil.Dialect, schema string) string {
	other := "-- only: postgres"
	if dialect == dbutil.Postgres {
		other = "-- only: sqlite"
	}
	var kept []string
	leaveOut := false
	for line := range strings.Lines(schema) {
		if !leaveOut {
			kept = append(kept, line)
		}
		leaveOut = strings.TrimSpace(line) == other
	}
	return strings.Join(kept, "")
}

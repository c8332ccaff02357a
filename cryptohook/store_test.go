package cryptohook

import (
	"errors"
	"fmt"
	"maps"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"

	"sendertrust/internal/queryplan"
)

// everyQuery are the statements of this package, by the names of their constants. A test finds those that are missing here.
var everyQuery = map[string]string{
	"getClaimsQuery": getClaimsQuery, "getGroundsQuery": getGroundsQuery, "getDueSendersQuery": getDueSendersQuery, "getDueOfQuery": getDueOfQuery, "getUnprovenOfQuery": getUnprovenOfQuery,
	"getHoldersRoomQuery": getHoldersRoomQuery, "getGroupQuery": getGroupQuery, "getHighestIndexQuery": getHighestIndexQuery, "getOlmSessionsQuery": getOlmSessionsQuery, "getOlmSessionsOfSendersQuery": getOlmSessionsOfSendersQuery, "getDevicesOfSendersQuery": getDevicesOfSendersQuery,
	"getListsOfSendersQuery": getListsOfSendersQuery, "keepDeviceQuery": keepDeviceQuery,
	"getNextRetryQuery": getNextRetryQuery, "insertSenderQuery": insertSenderQuery, "upsertClaimQuery": upsertClaimQuery, "deleteClaimQuery": deleteClaimQuery, "rejudgeSignedQuery": rejudgeSignedQuery,
	"rejudgeEarlierQuery": rejudgeEarlierQuery, "rejudgeRotatedQuery": rejudgeRotatedQuery, "getVerifiedQuery": getVerifiedQuery,
	"insertWithdrawalQuery": insertWithdrawalQuery, "deleteWithdrawalQuery": deleteWithdrawalQuery, "isWithdrawnQuery": isWithdrawnQuery, "getWithdrawnQuery": getWithdrawnQuery, "getOlmHashesQuery": getOlmHashesQuery,
	"getClaimedQuery": getClaimedQuery, "getStoredSessionsQuery": getStoredSessionsQuery, "getAwaitedQuery": getAwaitedQuery, "insertOlmHashQuery": insertOlmHashQuery,
	"insertSignatureQuery": insertSignatureQuery, "getSignersQuery": getSignersQuery, "getSignaturesQuery": getSignaturesQuery,
	"getIdentityQuery": getIdentityQuery, "upsertIdentityQuery": upsertIdentityQuery,
	"getDevicesByKeyQuery": getDevicesByKeyQuery, "getSigningKeysQuery": getSigningKeysQuery, "getWithdrawalsQuery": getWithdrawalsQuery, "countIdentityKeysQuery": countIdentityKeysQuery, "getProvenQuery": getProvenQuery, "deleteDevicesQuery": deleteDevicesQuery,
	"upsertDeviceQuery":      upsertDeviceQuery,
	"getMautrixDevicesQuery": getMautrixDevicesQuery, "trackUserQuery": trackUserQuery, "deleteMautrixDevicesQuery": deleteMautrixDevicesQuery,
	"upsertMautrixDeviceQuery": upsertMautrixDeviceQuery, "getCrossSigningKeysQuery": getCrossSigningKeysQuery, "upsertCrossSigningKeyQuery": upsertCrossSigningKeyQuery,
	"dropSignaturesQuery": dropSignaturesQuery, "getKeySignaturesQuery": getKeySignaturesQuery, "upsertKeySignatureQuery": upsertKeySignatureQuery,
	"getHolderQuery": getHolderQuery, "isTrackedQuery": isTrackedQuery, "getAccountQuery": getAccountQuery, "getTokenQuery": getTokenQuery,
	"upsertWithheldQuery": upsertWithheldQuery, "getWithheldQuery": getWithheldQuery, "pruneWithheldQuery": pruneWithheldQuery,
	"insertInboxQuery": insertInboxQuery, "getInboxQuery": getInboxQuery, "markHandledQuery": markHandledQuery, "pruneInboxQuery": pruneInboxQuery,
	"getMigrationQuery": getMigrationQuery, "putMigrationQuery": putMigrationQuery, "getUnclaimedQuery": getUnclaimedQuery,
	"countHeldQuery": countHeldQuery, "markAllOutdatedQuery": markAllOutdatedQuery, "getDeviceOwnersQuery": getDeviceOwnersQuery,
	"lastSeqQuery": lastSeqQuery, "getTextQuery": getTextQuery, "getAllLateQuery": getAllLateQuery, "markLateQuery": markLateQuery, "getLateQuery": getLateQuery, "wakeLateQuery": wakeLateQuery,
	"giveUpLateQuery":    giveUpLateQuery,
	"getKeyRequestQuery": getKeyRequestQuery, "getDueRequestsQuery": getDueRequestsQuery, "upsertKeyRequestQuery": upsertKeyRequestQuery,
	"sentKeyRequestQuery": sentKeyRequestQuery, "answerKeyRequestQuery": answerKeyRequestQuery, "deleteKeyRequestQuery": deleteKeyRequestQuery,
	"pruneKeyRequestsQuery": pruneKeyRequestsQuery, "getAskedQuery": getAskedQuery, "getOwnDevicesQuery": getOwnDevicesQuery,
	"upsertBundleQuery": upsertBundleQuery, "trimBundlesOfQuery": trimBundlesOfQuery, "trimBundlesQuery": trimBundlesQuery,
	"getBundlesQuery": getBundlesQuery, "deleteBundleQuery": deleteBundleQuery, "pruneBundlesQuery": pruneBundlesQuery,
	"upsertInviteQuery": upsertInviteQuery, "getInviterQuery": getInviterQuery, "getInvitesQuery": getInvitesQuery, "pruneInvitesQuery": pruneInvitesQuery,
	"getSourceUserQuery":     getSourceUserQuery,
	"upsertIdentityKeyQuery": upsertIdentityKeyQuery, "trimIdentityKeysQuery": trimIdentityKeysQuery, "getIdentityKeysQuery": getIdentityKeysQuery,
	"getSignedObjectsQuery": getSignedObjectsQuery, "getPublishedDevicesQuery": getPublishedDevicesQuery, "getRoomEncryptedQuery": getRoomEncryptedQuery,
	"getDeviceReportsQuery": getDeviceReportsQuery, "getIdentitiesQuery": getIdentitiesQuery, "countDevicesQuery": countDevicesQuery,
	"getOutdatedOfQuery": getOutdatedOfQuery,
	"getToBackUpQuery":   getToBackUpQuery, "countToBackUpQuery": countToBackUpQuery, "noteBackedUpQuery": noteBackedUpQuery,
	"isKnownQuery": isKnownQuery, "newestEventQuery": newestEventQuery, "insertHistoryQuery": insertHistoryQuery, "hastenQuery": hastenQuery,
	"upsertAccountQuery": upsertAccountQuery, "upsertOlmSessionQuery": upsertOlmSessionQuery, "upsertGroupQuery": upsertGroupQuery, "getMessageIndexQuery": getMessageIndexQuery,
	"insertMessageIndexQuery": insertMessageIndexQuery,
	"getOwnPicklesQuery":      getOwnPicklesQuery, "getSomePicklesQuery": getSomePicklesQuery, "getSecretQuery": getSecretQuery,
	"getOutboundPickleQuery": getOutboundPickleQuery, "getOlmPicklesQuery": getOlmPicklesQuery, "getOlmPickleQuery": getOlmPickleQuery, "getGroupPickleQuery": getGroupPickleQuery,
	"getGenerationQuery": getGenerationQuery, "getHolderNameQuery": getHolderNameQuery, "raiseQuery": raiseQuery, "getTablesQuery": getTablesQuery,
}

// mayScan are statements on tables that are meant to be tiny (one account a database, and at most so many bundles), and two that are made
// once in a database's life, of everything that mautrix has kept there.
var mayScan = map[string]bool{"getDeviceOwnersQuery": true, "markAllOutdatedQuery": true, "getAccountQuery": true, "getTablesQuery": true, "trimBundlesQuery": true,
	"getOwnPicklesQuery": true, "getSomePicklesQuery": true}

// everyOwnQuery are the statements that only one of the databases knows. None but the first reads a table of ours.
var everyOwnQuery = map[string]string{
	"lockGenerationQuery": lockGenerationQuery, "tryLockQuery": tryLockQuery, "unlockQuery": unlockQuery, "setLeaseQuery": setLeaseQuery,
	"ownerTableQuery": ownerTableQuery, "endConnectionsQuery": endConnectionsQuery, "getFileQuery": getFileQuery, "getSQLiteVersionQuery": getSQLiteVersionQuery,
	"getPostgresVersionQuery": getPostgresVersionQuery, "isLockedQuery": isLockedQuery, "getTableNamesQuery": getTableNamesQuery,
}

// Verify reads everything, on purpose.
func init() {
	for _, kind := range pickles {
		everyOwnQuery[kind.table] = kind.query
	}
}

func expectPlans(t *testing.T, db *dbutil.Database, queries map[string]string) {
	t.Helper()
	faults, err := queryplan.Faults(t.Context(), db, queries)
	if err != nil {
		t.Fatal(err)
	}
	for name, fault := range faults {
		if !mayScan[name] {
			t.Errorf("%s reads the whole table: %s", name, fault)
		}
	}
}

func TestEveryStatementUsesAnIndex(t *testing.T) {
	sqliteOnly(t)
	expectPlans(t, newTrustWorld(t).db, everyQuery)
}

func TestEveryStatementUsesAnIndexOnPostgreSQL(t *testing.T) {
	db := must(OpenPostgres(newPostgres(t)))
	defer db.Close()
	queries := maps.Clone(everyQuery)
	queries["lockGenerationQuery"] = lockGenerationQuery
	expectPlans(t, db, queries)
}

func TestEveryStatementIsKnownToTheTest(t *testing.T) {
	known := maps.Clone(everyQuery)
	maps.Copy(known, everyOwnQuery)
	for _, unknown := range must(queryplan.Unknown(".", known)) {
		t.Errorf("not in everyQuery: %s", unknown)
	}
}

func TestSchemaBeginsFromNothingAndUpgradesAgain(t *testing.T) {
	s := newTestStore(t)
	if err := s.Upgrade(t.Context()); err != nil {
		t.Errorf("a second upgrade fails: %v", err)
	}
	for _, table := range []string{"sendertrust_claim", "sendertrust_sender", "sendertrust_signature", "sendertrust_identity", "sendertrust_device", "sendertrust_inbox", "sendertrust_withheld"} {
		if exists := must(s.TableExists(t.Context(), table)); !exists {
			t.Errorf("there is no table %s", table)
		}
	}
	if exists := must(s.TableExists(t.Context(), versionTable)); !exists {
		t.Error("there is no version table")
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	w := newTrustWorld(t)
	move := func(by int) {
		if _, err := w.db.Exec(w.ctx, fmt.Sprintf("UPDATE %[1]s SET version=version+(%[2]d), compat=compat+(%[2]d)", versionTable, by)); err != nil {
			t.Fatal(err)
		}
	}
	move(1)
	defer move(-1) // another test may get the database
	if err := newStore(w.db, dbutil.NoopLogger).Upgrade(w.ctx); !errors.Is(err, dbutil.ErrUnsupportedDatabaseVersion) {
		t.Errorf("error %v", err)
	}
	if _, err := Install(w.ctx, w.client, w.options); !errors.Is(err, dbutil.ErrUnsupportedDatabaseVersion) {
		t.Errorf("Install: error %v", err)
	}
}

func TestRowsComeBackAsTheyWereStored(t *testing.T) {
	s, ctx := newTestStore(t), t.Context()
	for _, sd := range []*SenderData{
		{
			SessionID: "s", SenderKey: "k", SigningKey: "e", RoomID: "!r", Sender: "@a:test", Source: SourceDirect, State: StateDeviceInfo,
			Reason: "why", DeviceID: "D", MasterKey: "M", DeviceKeys: rawJSON(object{"a": 1}), RetryCount: 3,
			NextRetry: time.UnixMilli(5), ReceivedAt: time.UnixMilli(6), UpdatedAt: time.UnixMilli(7),
		},
		{SessionID: "another", SenderKey: "k", Source: SourceBackup, Legacy: true, State: StateUnknownDevice, ReceivedAt: time.UnixMilli(6), UpdatedAt: time.UnixMilli(8)},
	} {
		if err := s.putClaim(ctx, sd); err != nil {
			t.Fatal(err)
		}
		got := must(s.claim(ctx, sd.SessionID, "k"))
		if string(rawJSON(got)) != string(rawJSON(sd)) {
			t.Errorf("stored %s\n  read %s", rawJSON(sd), rawJSON(got))
		}
	}
	if missing, err := s.claim(ctx, "s", "other"); missing != nil || err != nil {
		t.Errorf("read %+v (%v)", missing, err)
	}
}

func TestMergedClaimKeepsTheTimeOfTheFirst(t *testing.T) {
	s, ctx := newTestStore(t), t.Context()
	first := &SenderData{SessionID: "s", SenderKey: "k", State: StateUnknownDevice, Source: SourceDirect, ReceivedAt: time.UnixMilli(1)}
	second := &SenderData{SessionID: "s", SenderKey: "k", State: StateSenderUnverified, Source: SourceDirect, ReceivedAt: time.UnixMilli(9)}
	for _, arrived := range []*SenderData{first, second} {
		if _, err := s.noteSigners(ctx, arrived); err != nil {
			t.Fatal(err)
		}
		if _, err := s.mergeClaim(ctx, arrived); err != nil {
			t.Fatal(err)
		}
	}
	if got := must(s.claim(ctx, "s", "k")); got.State != StateSenderUnverified || got.ReceivedAt.UnixMilli() != 1 {
		t.Errorf("stored %+v", got)
	}
}

func TestProvenRowsAreJudgedByTheIdentityOfToday(t *testing.T) {
	s, ctx := newTestStore(t), t.Context()
	anchor := trustAnchor{userID: "@bot:test", userSigningKey: "U"}
	put := func(sessionID id.SessionID, sender id.UserID, state State, masterKey id.Ed25519, signers ...id.Ed25519) {
		t.Helper()
		senderKey := id.SenderKey("key of " + sessionID)
		if err := s.putClaim(ctx, &SenderData{SessionID: sessionID, SenderKey: senderKey, SigningKey: "e", Sender: sender, State: state, MasterKey: masterKey}); err != nil {
			t.Fatal(err)
		}
		for _, signer := range signers {
			if _, err := s.putSignature(ctx, signature{sender, senderKey, "e", signer}, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	put("signed", "@a:test", StateSenderUnverified, "M2", "S2", "S3")
	put("by the former identity", "@a:test", StateSenderVerified, "M1", "S1")
	put("by both identities", "@a:test", StateSenderVerified, "M1", "S1", "S2", "S3")
	put("before the rotation", "@a:test", StateSenderUnverified, "M2", "S2")
	put("device", "@a:test", StateDeviceInfo, "", "S2")
	put("unknown", "@a:test", StateUnknownDevice, "")
	put("rejected", "@a:test", StateRejected, "")
	put("other user", "@b:test", StateSenderUnverified, "M2", "S2")
	const verified, violation, unverified, device = StateSenderVerified, StateVerificationViolation, StateSenderUnverified, StateDeviceInfo
	identity := &Identity{UserID: "@a:test", MasterKey: "M2", SelfSigningKey: "S2", FirstMasterKey: "M1", VerifiedBy: "U", WasVerified: true}
	for _, step := range []struct {
		when                           string
		change                         func()
		signed, former, both, rotation State
		bothBy                         id.Ed25519
	}{
		{"verified", func() {}, verified, unverified, verified, verified, "M2"},
		{"its signature is gone", func() { identity.VerifiedBy = "" }, violation, violation, violation, violation, "M2"},
		{"withdrawn", func() { identity.WasVerified = false }, unverified, unverified, unverified, unverified, "M2"},
		{"verified again", func() { identity.VerifiedBy, identity.WasVerified = "U", true }, verified, unverified, verified, verified, "M2"},
		{"reset", func() { identity.MasterKey, identity.SelfSigningKey, identity.VerifiedBy = "M3", "S4", "" }, violation, violation, violation, violation, "M2"},
		{"back", func() { identity.MasterKey, identity.SelfSigningKey, identity.VerifiedBy = "M2", "S2", "U" }, verified, unverified, verified, verified, "M2"},
		{"rotated", func() { identity.SelfSigningKey = "S3" }, verified, unverified, verified, device, "M2"},
		{"the first one again", func() { identity.MasterKey, identity.SelfSigningKey, identity.VerifiedBy = "M1", "S1", "" }, violation, violation, violation, device, "M2"},
		{"the first one again, and nobody is verified", func() { identity.WasVerified = false }, unverified, unverified, unverified, device, "M1"},
	} {
		step.change()
		if err := s.rejudge(ctx, identity, anchor, time.Now()); err != nil {
			t.Fatal(err)
		}
		for sessionID, want := range map[id.SessionID]State{
			"signed": step.signed, "by the former identity": step.former, "by both identities": step.both, "before the rotation": step.rotation,
			"device": StateDeviceInfo, "unknown": StateUnknownDevice, "rejected": StateRejected, "other user": StateSenderUnverified,
		} {
			got := must(s.claim(ctx, sessionID, id.SenderKey("key of "+sessionID)))
			if got.State != want {
				t.Errorf("%s: %s is %s, want %s", step.when, sessionID, got.State, want)
			}
			if sessionID == "by both identities" && got.MasterKey != step.bothBy {
				t.Errorf("%s: proven by %s, want %s", step.when, got.MasterKey, step.bothBy)
			}
			if demoted := want == device && sessionID == "before the rotation"; demoted && (got.MasterKey != "" || got.NextRetry.IsZero()) {
				t.Errorf("%s: %s keeps %+v", step.when, sessionID, got)
			}
		}
	}
}

func TestHandledEventsAreForgottenAndPendingOnesAreNot(t *testing.T) {
	s, ctx := newTestStore(t), t.Context()
	for i, eventID := range []id.EventID{"$handled", "$pending", "$young"} {
		e := &inboxEvent{eventID: eventID, seq: int64(i + 1), roomID: "!r", receivedAt: time.UnixMilli(int64(i)), event: "{}"}
		if err := s.putInboxEvent(ctx, e); err != nil {
			t.Fatal(err)
		}
	}
	for _, eventID := range []id.EventID{"$handled", "$young"} {
		if err := s.markHandled(ctx, eventID); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.prune(ctx, time.UnixMilli(2)); err != nil {
		t.Fatal(err)
	}
	var left string
	if err := s.QueryRow(ctx, "SELECT MIN(event_id) || ' ' || MAX(event_id) FROM sendertrust_inbox").Scan(&left); err != nil {
		t.Fatal(err)
	}
	if left != "$pending $young" {
		t.Errorf("left: %s", left)
	}
	if pending := must(s.pendingInbox(ctx, 0, 10)); len(pending) != 1 || pending[0].eventID != "$pending" {
		t.Errorf("pending: %v", pending)
	}
}

// The numbers of the inbox go on after a restart, or new events would come before those that wait.
func TestInboxNumbersGoOnAfterARestart(t *testing.T) {
	w, _, _ := twoPeople(t)
	say := func(body string) object {
		return w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": body})
	}
	w.sync(syncPart{timeline: []object{say("one"), say("two")}})
	w.restart()
	w.sync(syncPart{timeline: []object{say("three")}})
	w.handle()
	if len(w.seen) != 3 || w.seen[0].body != "one" || w.seen[1].body != "two" || w.seen[2].body != "three" {
		t.Errorf("seen %+v", w.seen)
	}
}

func otherClient(userID id.UserID, deviceID id.DeviceID) *mautrix.Client {
	client := must(mautrix.NewClient("http://server.test", userID, "token"))
	client.DeviceID = deviceID
	return client
}

func TestDatabaseOfAnotherAccountOrDeviceIsRefused(t *testing.T) {
	w := newTrustWorld(t)
	for _, tc := range []struct {
		userID   id.UserID
		deviceID id.DeviceID
		want     error
	}{
		{"@other:test", "BOTDEVICE", ErrOtherAccount}, {"@bot:test", "OTHER", ErrOtherDevice},
	} {
		if _, err := Install(w.ctx, otherClient(tc.userID, tc.deviceID), w.options); !errors.Is(err, tc.want) {
			t.Errorf("error %v, want %v", err, tc.want)
		}
	}
	options := w.options
	options.PickleKey = []byte("another")
	if _, err := Install(w.ctx, otherClient("@bot:test", "BOTDEVICE"), options); !errors.Is(err, ErrPickleKey) {
		t.Errorf("error %v, want %v", err, ErrPickleKey)
	}
	if _, err := Install(w.ctx, otherClient("@bot:test", ""), w.options); !errors.Is(err, ErrNotLoggedIn) {
		t.Errorf("error %v, want %v", err, ErrNotLoggedIn)
	}
	if deviceID, err := StoredDevice(w.ctx, w.db, "@bot:test"); deviceID != "BOTDEVICE" || err != nil {
		t.Errorf("device %q (%v)", deviceID, err)
	}
	if _, err := StoredDevice(w.ctx, w.db, "@other:test"); !errors.Is(err, ErrOtherAccount) {
		t.Errorf("error %v, want %v", err, ErrOtherAccount)
	}
}

package cryptohook

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// everyQuery are the statements of this package, by the names of their constants. A test finds those that are missing here.
var everyQuery = map[string]string{
	"getClaimsQuery": getClaimsQuery, "getDueSendersQuery": getDueSendersQuery, "getDueOfQuery": getDueOfQuery, "getUnprovenOfQuery": getUnprovenOfQuery,
	"getHoldersRoomQuery": getHoldersRoomQuery, "getOlmSessionsQuery": getOlmSessionsQuery, "keepDeviceQuery": keepDeviceQuery,
	"getNextRetryQuery": getNextRetryQuery, "insertSenderQuery": insertSenderQuery, "upsertClaimQuery": upsertClaimQuery, "deleteClaimQuery": deleteClaimQuery, "rejudgeSignedQuery": rejudgeSignedQuery,
	"rejudgeEarlierQuery": rejudgeEarlierQuery, "rejudgeRotatedQuery": rejudgeRotatedQuery, "getVerifiedQuery": getVerifiedQuery,
	"insertWithdrawalQuery": insertWithdrawalQuery, "deleteWithdrawalQuery": deleteWithdrawalQuery, "isWithdrawnQuery": isWithdrawnQuery,
	"insertSignatureQuery": insertSignatureQuery, "getSignersQuery": getSignersQuery, "getSignaturesQuery": getSignaturesQuery,
	"getIdentityQuery": getIdentityQuery, "upsertIdentityQuery": upsertIdentityQuery,
	"getDevicesByKeyQuery": getDevicesByKeyQuery, "getSigningKeyQuery": getSigningKeyQuery, "deleteDevicesQuery": deleteDevicesQuery,
	"upsertDeviceQuery": upsertDeviceQuery,
	"getHolderQuery":    getHolderQuery, "isTrackedQuery": isTrackedQuery, "getAccountQuery": getAccountQuery, "getTokenQuery": getTokenQuery,
	"upsertWithheldQuery": upsertWithheldQuery, "getWithheldQuery": getWithheldQuery, "pruneWithheldQuery": pruneWithheldQuery,
	"insertInboxQuery": insertInboxQuery, "getInboxQuery": getInboxQuery, "markHandledQuery": markHandledQuery, "pruneInboxQuery": pruneInboxQuery,
	"getMigrationQuery": getMigrationQuery, "putMigrationQuery": putMigrationQuery, "getUnclaimedQuery": getUnclaimedQuery,
	"countHeldQuery": countHeldQuery, "markAllOutdatedQuery": markAllOutdatedQuery, "getDeviceOwnersQuery": getDeviceOwnersQuery,
	"lastSeqQuery": lastSeqQuery, "markLateQuery": markLateQuery, "getLateQuery": getLateQuery, "wakeLateQuery": wakeLateQuery,
	"giveUpLateQuery":    giveUpLateQuery,
	"getKeyRequestQuery": getKeyRequestQuery, "getDueRequestsQuery": getDueRequestsQuery, "upsertKeyRequestQuery": upsertKeyRequestQuery,
	"sentKeyRequestQuery": sentKeyRequestQuery, "answerKeyRequestQuery": answerKeyRequestQuery, "deleteKeyRequestQuery": deleteKeyRequestQuery,
	"pruneKeyRequestsQuery": pruneKeyRequestsQuery, "getAskedQuery": getAskedQuery, "getOwnDevicesQuery": getOwnDevicesQuery,
	"upsertBundleQuery": upsertBundleQuery, "trimBundlesOfQuery": trimBundlesOfQuery, "trimBundlesQuery": trimBundlesQuery,
	"getBundlesQuery": getBundlesQuery, "deleteBundleQuery": deleteBundleQuery, "pruneBundlesQuery": pruneBundlesQuery,
	"upsertInviteQuery": upsertInviteQuery, "getInviterQuery": getInviterQuery, "pruneInvitesQuery": pruneInvitesQuery,
	"getSourceUserQuery": getSourceUserQuery,
	"upsertAccountQuery": upsertAccountQuery, "upsertOlmSessionQuery": upsertOlmSessionQuery, "getMessageIndexQuery": getMessageIndexQuery,
	"insertMessageIndexQuery": insertMessageIndexQuery,
	"getGenerationQuery":      getGenerationQuery, "getHolderNameQuery": getHolderNameQuery, "raiseQuery": raiseQuery, "getTablesQuery": getTablesQuery,
}

// mayScan are statements on tables that are meant to be tiny (one account a database, and at most so many bundles), and two that are made
// once in a database's life, of everything that mautrix has kept there.
var mayScan = map[string]bool{"getDeviceOwnersQuery": true, "markAllOutdatedQuery": true, "getAccountQuery": true, "getTablesQuery": true, "trimBundlesQuery": true}

// everyOwnQuery are the statements that only one of the databases knows. None but the first reads a table of ours.
var everyOwnQuery = map[string]string{
	"lockGenerationQuery": lockGenerationQuery, "tryLockQuery": tryLockQuery, "setLeaseQuery": setLeaseQuery,
	"ownerTableQuery": ownerTableQuery, "endConnectionsQuery": endConnectionsQuery, "getFileQuery": getFileQuery, "getSQLiteVersionQuery": getSQLiteVersionQuery,
	"getPostgresVersionQuery": getPostgresVersionQuery, "isLockedQuery": isLockedQuery,
}

var placeholder = regexp.MustCompile(`\$(\d+)`)

// parameters counts the parameters of a statement.
func parameters(query string) (count int) {
	for _, match := range placeholder.FindAllStringSubmatch(query, -1) {
		count = max(count, must(strconv.Atoi(match[1])))
	}
	return count
}

func TestEveryStatementUsesAnIndex(t *testing.T) {
	sqliteOnly(t)
	w := newTrustWorld(t)
	for name, query := range everyQuery {
		rows, err := w.db.Query(w.ctx, "EXPLAIN QUERY PLAN "+query, make([]any, parameters(query))...)
		plan, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (detail string, err error) {
			var unused int
			return detail, row.Scan(&unused, &unused, &unused, &detail)
		}, err).AsList()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, detail := range plan {
			// SQLite says SEARCH of MIN and MAX even where it has to read every row.
			scan := (strings.HasPrefix(detail, "SCAN ") || strings.HasPrefix(detail, "SEARCH ")) && !strings.Contains(detail, "USING")
			if !mayScan[name] && (scan || strings.Contains(detail, "TEMP B-TREE FOR ORDER BY") && strings.Contains(query, "LIMIT")) {
				t.Errorf("%s reads the whole table: %s", name, detail)
			}
		}
	}
}

// postgresPlan is a node of what EXPLAIN tells.
type postgresPlan struct {
	NodeType  string `json:"Node Type"`
	Relation  string `json:"Relation Name"`
	Index     string `json:"Index Name"`
	Condition string `json:"Index Cond"`
	Plans     []postgresPlan
}

// TestEveryStatementUsesAnIndexOnPostgreSQL makes reading a whole table, and sorting, so dear to the planner that it does either only
// where nothing else is possible: with the tables empty, it would always be cheaper.
func TestEveryStatementUsesAnIndexOnPostgreSQL(t *testing.T) {
	db := must(OpenPostgres(newPostgres(t)))
	defer db.Close()
	conn := must(db.RawDB.Conn(t.Context()))
	defer conn.Close()
	run := func(statement string) {
		t.Helper()
		if _, err := conn.ExecContext(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	run("SET plan_cache_mode=force_generic_plan; SET enable_seqscan=off; SET enable_bitmapscan=off; SET enable_sort=off; SET enable_hashjoin=off; SET enable_mergejoin=off")
	everyQuery := maps.Clone(everyQuery)
	everyQuery["lockGenerationQuery"] = lockGenerationQuery
	for name, query := range everyQuery {
		execute := name
		if count := parameters(query); count > 0 {
			execute += "(NULL" + strings.Repeat(", NULL", count-1) + ")"
		}
		run("PREPARE " + name + " AS " + query)
		var explained []byte
		if err := conn.QueryRowContext(t.Context(), "EXPLAIN (FORMAT JSON) EXECUTE "+execute).Scan(&explained); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var plans []struct{ Plan postgresPlan }
		if err := json.Unmarshal(explained, &plans); err != nil || len(plans) != 1 {
			t.Fatalf("%s: %v in %s", name, err, explained)
		}
		if fault := plans[0].Plan.fault(t, conn, query); fault != "" && !mayScan[name] {
			t.Errorf("%s reads the whole table: %s\n%s", name, fault, explained)
		}
	}
}

// fault says what in a plan grows with the table. A partial index that is read from one end to the other is what was asked for.
func (p *postgresPlan) fault(t *testing.T, conn *sql.Conn, query string) string {
	switch {
	case p.NodeType == "Seq Scan":
		return "no index on " + p.Relation
	case p.NodeType == "Sort" && strings.Contains(query, "LIMIT") && !strings.Contains(query, " IN ("):
		return "the index does not have the order"
	case p.Index != "" && p.Condition == "":
		var partial bool
		const query = "SELECT indpred IS NOT NULL FROM pg_index WHERE indexrelid=$1::regclass"
		if err := conn.QueryRowContext(t.Context(), query, p.Index).Scan(&partial); err != nil {
			t.Fatal(err)
		} else if !partial {
			return "all of " + p.Index
		}
	}
	for _, inner := range p.Plans {
		if fault := inner.fault(t, conn, query); fault != "" {
			return fault
		}
	}
	return ""
}

func TestEveryStatementIsKnownToTheTest(t *testing.T) {
	for _, file := range must(filepath.Glob("*.go")) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(node ast.Node) bool {
			spec, ok := node.(*ast.ValueSpec)
			if !ok {
				return true
			}
			for i, name := range spec.Names {
				if strings.HasSuffix(name.Name, "Query") && i < len(spec.Values) && isText(spec.Values[i]) && everyQuery[name.Name]+everyOwnQuery[name.Name] == "" {
					t.Errorf("%s in %s is not in everyQuery", name.Name, file)
				}
			}
			return true
		})
	}
}

// isText says that an expression is a string, or strings added up.
func isText(expression ast.Expr) bool {
	switch e := expression.(type) {
	case *ast.BasicLit:
		return e.Kind == token.STRING
	case *ast.BinaryExpr:
		return isText(e.X) || isText(e.Y)
	default:
		return false
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
			if _, err := s.putSignature(ctx, signature{sender, senderKey, "e", signer}); err != nil {
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

package bot

import (
	"path/filepath"
	"testing"

	"go.mau.fi/util/dbutil"

	"sendertrust/cryptohook"
	"sendertrust/internal/queryplan"
)

// everyQuery are the statements of this package, by the names of their constants. A test finds those that are missing here.
var everyQuery = map[string]string{
	"getRecordQuery": getRecordQuery, "getOfSessionQuery": getOfSessionQuery, "getOfOwnerQuery": getOfOwnerQuery, "getSinceQuery": getSinceQuery,
	"getDueQuery": getDueQuery, "getNextDueQuery": getNextDueQuery, "insertRecordQuery": insertRecordQuery, "setAnswerQuery": setAnswerQuery,
	"setDueQuery": setDueQuery, "setVerdictQuery": setVerdictQuery, "deleteRecordQuery": deleteRecordQuery, "forgetRoomQuery": forgetRoomQuery,
	"forgetOldQuery": forgetOldQuery, "wasSaidQuery": wasSaidQuery, "insertSaidQuery": insertSaidQuery, "forgetSaidQuery": forgetSaidQuery,
	"getSaidAtQuery": getSaidAtQuery, "deleteSaidQuery": deleteSaidQuery, "endDoubtsQuery": endDoubtsQuery,
	"getOfAnswerQuery": getOfAnswerQuery, "getEditsQuery": getEditsQuery, "setNextSignQuery": setNextSignQuery,
	"setRedactedQuery": setRedactedQuery, "clearRecordQuery": clearRecordQuery,
	"getModesQuery": getModesQuery, "putModeQuery": putModeQuery, "deleteModeQuery": deleteModeQuery,
	"insertAuditQuery": insertAuditQuery, "getAuditQuery": getAuditQuery, "getAuditOfQuery": getAuditOfQuery, "amendAuditQuery": amendAuditQuery, "pruneAuditQuery": pruneAuditQuery,
	"getVerificationsQuery":   getVerificationsQuery,
	"insertVerificationQuery": insertVerificationQuery, "endVerificationQuery": endVerificationQuery,
	"openVerificationsQuery": openVerificationsQuery, "hadVerificationQuery": hadVerificationQuery,
	"forgetVerificationsQuery": forgetVerificationsQuery,
}

// upgraded gives a database with the bot's tables.
func upgraded(t *testing.T, db *dbutil.Database, err error) *dbutil.Database {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if err = newRecords(db, nil, dbutil.NoopLogger).Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	return db
}

func TestEveryStatementUsesAnIndex(t *testing.T) {
	file, err := dbutil.NewWithDialect("file:"+filepath.Join(t.TempDir(), "bot.db"), "sqlite3-fk-wal")
	expectPlans(t, upgraded(t, file, err))
	uri, err := postgresServer(t).NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	server, err := cryptohook.OpenPostgres(uri)
	expectPlans(t, upgraded(t, server, err))
}

func expectPlans(t *testing.T, db *dbutil.Database) {
	t.Helper()
	faults, err := queryplan.Faults(t.Context(), db, everyQuery)
	if err != nil {
		t.Fatal(err)
	}
	for name, fault := range faults {
		t.Errorf("%s reads the whole table on %v: %s", name, db.Dialect, fault)
	}
}

func TestEveryStatementIsKnownToTheTest(t *testing.T) {
	unknown, err := queryplan.Unknown(".", everyQuery)
	if err != nil {
		t.Fatal(err)
	}
	for _, what := range unknown {
		t.Errorf("not in everyQuery: %s", what)
	}
}

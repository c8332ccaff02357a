package bot

import (
	"maps"
	"os"
	"testing"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// A database of the version before becomes the same as a new one, and keeps what it knows.
func TestSchemaIsUpgraded(t *testing.T) {
	file := func() *dbutil.Database {
		db, err := dbutil.NewWithDialect("file:"+t.TempDir()+"/bot.db", "sqlite3-fk-wal")
		return must(db, err)(t)
	}
	server := func() *dbutil.Database {
		uri := must(postgresServer(t).NewDatabase(t.Context()))(t)
		return must(cryptohook.OpenPostgres(uri))(t)
	}
	for _, open := range []func() *dbutil.Database{file, server} {
		fresh := upgraded(t, open(), nil)
		old := open()
		exec := func(statement string, args ...any) {
			t.Helper()
			if _, err := old.Exec(t.Context(), statement, args...); err != nil {
				t.Fatal(err)
			}
		}
		exec(string(must(os.ReadFile("testdata/schema/v1.sql"))(t)))
		exec(`CREATE TABLE sendertrust_bot_version (version INTEGER, compat INTEGER)`)
		exec(`INSERT INTO sendertrust_bot_version VALUES (1, 1)`)
		for _, answerID := range []id.EventID{"", "$answer"} {
			exec(`INSERT INTO bot_answer VALUES ($1, '!room', '@a:test', '', $2, 's', '@a:test', '{"Code":"verified"}', 5, 1, 6, NULL)`, "$to"+answerID, answerID)
		}
		upgraded(t, old, nil)
		if got, want := columnsOf(t, old), columnsOf(t, fresh); !maps.Equal(got, want) {
			t.Errorf("%v: upgraded\n%v\nnew\n%v", old.Dialect, got, want)
		}
		records := newRecords(old, nil, dbutil.NoopLogger)
		// What was not answered is not taken for being answered just now: it may be one of those that a bot that only warns leaves out.
		for eventID, kind := range map[id.EventID]answerKind{"$to": kindQuiet, "$to$answer": kindReply} {
			rec := must(records.get(t.Context(), eventID))(t)
			if rec == nil || rec.kind != kind || rec.verdict.Code != cryptohook.CodeVerified || rec.edits != 1 || rec.editOf != "" || rec.redactedBy != "" {
				t.Errorf("%v: kept %+v", old.Dialect, rec)
			}
		}
	}
}

// columnsOf gives the columns and the indices of our tables.
func columnsOf(t *testing.T, db *dbutil.Database) map[string]string {
	t.Helper()
	query := `
		SELECT m.name || '.' || c.name, c.type || ' ' || c."notnull" || ' ' || c.pk || ' ' || COALESCE(c.dflt_value, '')
		FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.name LIKE 'bot_%' AND m.type='table'
		UNION ALL SELECT name, sql FROM sqlite_master WHERE name LIKE 'bot_%' AND type='index'
	`
	if db.Dialect == dbutil.Postgres {
		query = `
			SELECT table_name || '.' || column_name, data_type || ' ' || is_nullable || ' ' || COALESCE(column_default, '')
			FROM information_schema.columns WHERE table_name LIKE 'bot_%'
			UNION ALL SELECT indexname, indexdef FROM pg_indexes WHERE indexname LIKE 'bot_%'
		`
	}
	found := make(map[string]string)
	rows, err := db.Query(t.Context(), query)
	err = dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (name string, err error) {
		var what string
		err = row.Scan(&name, &what)
		found[name] = what
		return name, err
	}, err).Iter(func(string) (bool, error) { return true, nil })
	if err != nil {
		t.Fatal(err)
	}
	if len(found) < 20 {
		t.Fatalf("found only %v", found)
	}
	return found
}

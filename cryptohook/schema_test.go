package cryptohook

import (
	"database/sql"
	"maps"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
)

// A database of every earlier version becomes the same as a new one, and keeps what it knows.
func TestSchemaIsUpgradedFromEveryVersion(t *testing.T) {
	fresh := newTestStore(t)
	old := upgradedFrom(t, 1, func(exec func(statement string, args ...any)) {
		for _, row := range [][]any{{"proven", "@a:test", "k1", "sender_unverified", "M"}, {"known", "@a:test", "k1", "device_info", ""}, {"conflict", "@b:test", "k2", "unknown_device", ""}, {"conflict", "@a:test", "k1", "sender_verified", "M"}} {
			exec(`INSERT INTO sendertrust_session VALUES ($1, $3, 'e', '!room', $2, 'direct', false, $4, '', 'D', $5, NULL, 3, 7, 8, 9)`, row...)
		}
		exec(`INSERT INTO sendertrust_identity VALUES ('@a:test', 'M', 'M', 'S', '', false, 5)`)
	})
	fromLast := upgradedFrom(t, 2, func(func(string, ...any)) {})
	for _, upgraded := range []*store{old, fromLast} {
		if got, want := schemaOf(t, upgraded), schemaOf(t, fresh); !maps.Equal(got, want) {
			t.Errorf("upgraded:\n%s\nnew:\n%s", rawJSON(got), rawJSON(want))
		}
	}
	claims := must(old.claims(t.Context(), "conflict"))
	if len(claims) != 2 || claims[0].Sender != "@a:test" || claims[0].MasterKey != "M" || claims[1].RetryCount != 3 || claims[1].NextRetry.UnixMilli() != 7 {
		t.Errorf("kept %s", rawJSON(claims))
	}
	if signers := must(old.signers(t.Context(), "@a:test", "k1", "e")); len(signers) != 1 || signers[0] != "S" {
		t.Errorf("signers %v", signers)
	}
	if err := old.rejudge(t.Context(), &Identity{UserID: "@a:test", MasterKey: "M", FirstMasterKey: "M", SelfSigningKey: "S"}, trustAnchor{}, time.Now()); err != nil {
		t.Fatal(err)
	}
	if got := must(old.claim(t.Context(), "proven", "k1")); got.State != StateSenderUnverified {
		t.Errorf("what was proven is %s", got.State)
	}
}

// schemaOf gives the columns and the indices of our tables.
func schemaOf(t *testing.T, s *store) map[string]string {
	t.Helper()
	query := `
		SELECT m.name || '.' || c.name, c.type || ' ' || c."notnull" || ' ' || c.pk FROM sqlite_master m, pragma_table_info(m.name) c
		WHERE m.name LIKE 'sendertrust%' AND m.type IN ('table', 'view')
		UNION ALL SELECT name, replace(replace(sql, char(10), ''), char(9), '') FROM sqlite_master WHERE name LIKE 'sendertrust%' AND type='index'
	`
	if onPostgres {
		query = `
			SELECT table_name || '.' || column_name, data_type || ' ' || is_nullable FROM information_schema.columns WHERE table_name LIKE 'sendertrust%'
			UNION ALL SELECT indexname, indexdef FROM pg_indexes WHERE indexname LIKE 'sendertrust%'
		`
	}
	found := make(map[string]string)
	rows, err := s.Query(t.Context(), query)
	err = dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (name string, err error) {
		var what sql.NullString
		err = row.Scan(&name, &what)
		found[name] = what.String
		return name, err
	}, err).Iter(func(string) (bool, error) { return true, nil })
	if err != nil {
		t.Fatal(err)
	}
	return found
}

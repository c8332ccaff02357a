package cryptohook

import (
	"context"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/sqlstatestore"

	"sendertrust/e2e/postgres"
)

// The databases of these tests: files of SQLite, or databases on a private PostgreSQL server when the environment says so.

// onPostgres has the tests that go through newDatabase run on PostgreSQL.
var onPostgres = os.Getenv("TEST_DATABASE") == "postgres"

// sqliteOnly skips a test that is about files, or about faults that only SQLite's driver lets us inject.
func sqliteOnly(t *testing.T) {
	t.Helper()
	if onPostgres {
		t.Skip("for SQLite only")
	}
}

// databases on PostgreSQL; TestMain stops the server.
var databases = postgres.NewPool("..", upgradeAll)

func thePostgres(t testing.TB) *postgres.Server {
	t.Helper()
	server, err := databases.Server()
	if err != nil {
		t.Fatal(err)
	}
	return server
}

func upgradeAll(ctx context.Context, uri string) error {
	db, err := OpenPostgres(uri)
	if err != nil {
		return err
	}
	return errors.Join(
		sqlstatestore.NewSQLStateStore(db, nil, false).Upgrade(ctx),
		crypto.NewSQLCryptoStore(db, nil, "", "", nil).DB.Upgrade(ctx),
		newStore(db, nil).Upgrade(ctx),
		db.Close(),
	)
}

// newDatabase gives where a test may have a new database: a file, or the URI of one that has its tables already.
func newDatabase(t testing.TB) string {
	t.Helper()
	if !onPostgres {
		return filepath.Join(t.TempDir(), "test.db")
	}
	return newPostgres(t)
}

// newPostgres gives the URI of a database on PostgreSQL that has its tables, and nothing in them.
func newPostgres(t testing.TB) string {
	t.Helper()
	uri := must(databases.Take(t.Context()))
	t.Cleanup(func() {
		if err := databases.GiveBack(context.Background(), uri); err != nil {
			t.Error(err)
		}
	})
	return uri
}

func clonePostgres(t *testing.T, server *postgres.Server, from string) string {
	t.Helper()
	uri := must(server.Clone(t.Context(), from))
	t.Cleanup(func() {
		if err := server.Drop(context.Background(), uri); err != nil {
			t.Error(err)
		}
	})
	return uri
}

// copyDatabase gives a copy of a database that nobody has open.
func copyDatabase(t *testing.T, from string) string {
	t.Helper()
	if onPostgres {
		return clonePostgres(t, thePostgres(t), from)
	}
	at := newDatabase(t)
	if err := os.WriteFile(at, must(os.ReadFile(from)), 0o600); err != nil {
		t.Fatal(err)
	}
	return at
}

// openDatabase opens what newDatabase has given. The driver is SQLite's.
func openDatabase(driver, at string) (*dbutil.Database, error) {
	if strings.HasPrefix(at, "postgres://") {
		return OpenPostgres(at)
	}
	return dbutil.NewWithDialect("file:"+(&url.URL{Path: at}).EscapedPath()+"?_txlock=immediate", driver)
}

package bot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.mau.fi/util/dbutil"

	"sendertrust/cryptohook"
	"sendertrust/e2e/postgres"
)

// theServer is a private PostgreSQL server, started when the first test needs it.
var theServer struct {
	once   sync.Once
	server *postgres.Server
	err    error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if server := theServer.server; server != nil {
		if err := server.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func postgresServer(t *testing.T) *postgres.Server {
	t.Helper()
	theServer.once.Do(func() { theServer.server, theServer.err = postgres.Start(context.Background(), "..") })
	if theServer.err != nil {
		t.Fatal(theServer.err)
	}
	return theServer.server
}

// newDatabase gives a function that opens one and the same new database each time: a file of SQLite, or one on PostgreSQL when the
// environment says so.
func newDatabase(t *testing.T) (open func() *dbutil.Database) {
	t.Helper()
	at := filepath.Join(t.TempDir(), "bot.db")
	connect := func() (*dbutil.Database, error) {
		return dbutil.NewWithDialect("file:"+at+"?_txlock=immediate", "sqlite3-fk-wal")
	}
	if os.Getenv("TEST_DATABASE") == "postgres" {
		uri, err := postgresServer(t).NewDatabase(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		connect = func() (*dbutil.Database, error) { return cryptohook.OpenPostgres(uri) }
	}
	return func() *dbutil.Database {
		t.Helper()
		db, err := connect()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = db.Close() })
		return db
	}
}

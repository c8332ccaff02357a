package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
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

// postgresServer is started when the first test needs it; TestMain stops it.
var postgresServer struct {
	once   sync.Once
	server *postgres.Server
	// upgraded is a database with all tables and nothing in them, which new ones are copied from.
	upgraded string
	err      error

	mu sync.Mutex
	// free are databases that tests have used, with nothing but their tables.
	free []string
}

func thePostgres(t testing.TB) *postgres.Server {
	t.Helper()
	s := &postgresServer
	s.once.Do(func() {
		ctx := context.Background()
		if s.server, s.err = postgres.Start(ctx, ".."); s.err != nil {
			return
		}
		if s.upgraded, s.err = s.server.NewDatabase(ctx); s.err == nil {
			s.err = upgradeAll(ctx, s.upgraded)
		}
	})
	if s.err != nil {
		t.Fatal(s.err)
	}
	return s.server
}

func stopPostgres() {
	if server := postgresServer.server; server != nil {
		if err := server.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
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
	server, s := thePostgres(t), &postgresServer
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.free) == 0 {
		s.free = append(s.free, must(server.Clone(t.Context(), s.upgraded)))
	}
	last := len(s.free) - 1
	uri := s.free[last]
	s.free = s.free[:last]
	t.Cleanup(func() {
		if err := server.Empty(context.Background(), uri); err != nil {
			t.Error(err)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.free = append(s.free, uri)
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

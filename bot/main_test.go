package bot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"

	"sendertrust/cryptohook"
	"sendertrust/e2e/postgres"
)

// databases on PostgreSQL, with all tables of the bot and of its hook.
var databases = postgres.NewPool("..", func(ctx context.Context, uri string) error {
	db, err := cryptohook.OpenPostgres(uri)
	if err != nil {
		return err
	}
	return errors.Join(makeTables(ctx, db), db.Close())
})

func makeTables(ctx context.Context, db *dbutil.Database) error {
	client, err := mautrix.NewClient("http://127.0.0.1:1", "@bot:test", "token")
	if err != nil {
		return err
	}
	client.DeviceID = "DEVICE"
	owner, err := cryptohook.Own(ctx, db)
	if err != nil {
		return err
	}
	_, err = cryptohook.Install(ctx, client, cryptohook.Options{DB: db, PickleKey: []byte("pickle"), Owner: owner})
	if err == nil {
		err = newRecords(db, nil, dbutil.NoopLogger).Upgrade(ctx)
	}
	return errors.Join(err, owner.Release())
}

func TestMain(m *testing.M) {
	code := m.Run()
	if err := databases.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func postgresServer(t *testing.T) *postgres.Server {
	t.Helper()
	return must(databases.Server())(t)
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
		uri := must(databases.Take(t.Context()))(t)
		t.Cleanup(func() {
			if err := databases.GiveBack(context.Background(), uri); err != nil {
				t.Error(err)
			}
		})
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

// installedHook is a hook on a new database, which it owns until the test ends.
func installedHook(t *testing.T, client *mautrix.Client) *cryptohook.Hook {
	t.Helper()
	db := newDatabase(t)()
	owner := must(cryptohook.Own(t.Context(), db))(t)
	t.Cleanup(func() { _ = owner.Release() })
	return must(cryptohook.Install(t.Context(), client, cryptohook.Options{DB: db, PickleKey: []byte("pickle"), Owner: owner}))(t)
}

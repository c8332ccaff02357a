package cryptohook

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// openSQLiteFile opens a file of a test by [OpenSQLite].
func openSQLiteFile(t *testing.T, file string, log zerolog.Logger) *dbutil.Database {
	t.Helper()
	db := must(OpenSQLite(SQLiteOptions{Driver: safeDriver, URI: "file:" + file + "?_txlock=immediate", File: file, Log: log}))
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// What is damaged while a process works with it is not made worse: from the first error on nothing is read or written, and the process
// does not own the database any more.
func TestDamageMetAtWorkShutsTheDatabase(t *testing.T) {
	sqliteOnly(t)
	file := filepath.Join(t.TempDir(), "bot.db")
	db := openSQLiteFile(t, file, zerolog.Nop())
	owner := must(Own(t.Context(), db))
	defer owner.Release()
	must(db.Exec(t.Context(), "CREATE TABLE big (id INTEGER PRIMARY KEY, text TEXT)"))
	for range 50 {
		must(db.Exec(t.Context(), "INSERT INTO big (text) VALUES ($1)", strings.Repeat("x", 3000)))
	}
	must(db.Exec(t.Context(), "PRAGMA wal_checkpoint(TRUNCATE)"))
	whole := must(os.ReadFile(file))
	must(0, os.WriteFile(file, append(bytes.Clone(whole[:4096]), bytes.Repeat([]byte{0xa5}, len(whole)-4096)...), 0o600))
	fresh := openSQLiteFile(t, file, zerolog.Nop())
	pool := fresh.RawDB.Driver().(*sqlitePool)
	pool.owner.Store(owner)
	var count int
	err := fresh.QueryRow(t.Context(), "SELECT COUNT(text) FROM big").Scan(&count)
	if _, ok := errors.AsType[*DamagedError](err); !ok || !strings.Contains(err.Error(), "bot.db is damaged (") {
		t.Fatalf("error %v", err)
	}
	if _, ok := errors.AsType[*DamagedError](owner.Err()); !ok || errors.Is(owner.Err(), ErrNotOwner) {
		t.Errorf("the owner is told %v", owner.Err())
	}
	if _, err = fresh.Exec(t.Context(), "CREATE TABLE other (id INTEGER)"); !errors.As(err, new(*DamagedError)) {
		t.Errorf("a write ends with %v", err)
	}
}

// A file that is empty, or gone without its log, is no new database when it had tables once.
func TestLostFileIsNotTakenForANewOne(t *testing.T) {
	sqliteOnly(t)
	for name, lose := range map[string]func(file string) error{
		"emptied":           func(file string) error { return os.Truncate(file, 0) },
		"cut within a page": func(file string) error { return os.Truncate(file, 5000) },
		"gone, its log there": func(file string) error {
			return errors.Join(os.Remove(file), os.WriteFile(file+"-wal", []byte("frames"), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "bot.db")
			db := openSQLiteFile(t, file, zerolog.Nop())
			owner := must(Own(t.Context(), db))
			must(0, owner.Write(t.Context(), db, func(ctx context.Context) error {
				_, err := db.Exec(ctx, "CREATE TABLE some (id INTEGER)")
				return err
			}))
			must(0, owner.Release())
			must(0, db.Close())
			must(0, lose(file))
			again := openSQLiteFile(t, file, zerolog.Nop())
			if _, err := Own(t.Context(), again); !errors.As(err, new(*DamagedError)) {
				t.Errorf("error %v", err)
			}
		})
	}
	// One that was taken away whole is.
	file := filepath.Join(t.TempDir(), "bot.db")
	must(0, os.WriteFile(file+lockSuffix, []byte(lockText(true)), 0o600))
	owner, err := Own(t.Context(), openSQLiteFile(t, file, zerolog.Nop()))
	if err != nil {
		t.Fatal(err)
	}
	must(0, owner.Release())
}

// A key that cannot be decrypted is damage if others can, and another pickle key's if none can.
func TestUnreadableKeysAreDamageIfOthersCanBeRead(t *testing.T) {
	w := newTrustWorld(t)
	pickleKey := w.hook.options.PickleKey
	must(0, w.hook.uow.PutSecret(t.Context(), id.SecretXSMaster, "secret"))
	if err := CheckKeys(t.Context(), w.db, pickleKey); err != nil {
		t.Errorf("whole keys: %v", err)
	}
	if err := CheckKeys(t.Context(), w.db, []byte("another")); !errors.Is(err, ErrPickleKey) {
		t.Errorf("another pickle key: %v", err)
	}
	if damage, err := VerifyDatabase(t.Context(), w.db, pickleKey); err != nil || len(damage) > 0 {
		t.Errorf("a check finds %q (%v)", damage, err)
	}
	must(w.db.Exec(t.Context(), "UPDATE crypto_account SET account=$1", []byte("garbage")))
	if err := CheckKeys(t.Context(), w.db, pickleKey); !errors.As(err, new(*DamagedError)) {
		t.Errorf("a damaged account: %v", err)
	}
	if damage, err := VerifyDatabase(t.Context(), w.db, pickleKey); err != nil || len(damage) != 1 || !strings.Contains(damage[0], "cannot be decrypted") {
		t.Errorf("a check finds %q (%v)", damage, err)
	}
}

// The state of a room comes once. While another program keeps the database locked, it waits: a room that is encrypted must not be taken
// for one that is not.
func TestRoomStateWaitsForTheDatabase(t *testing.T) {
	sqliteOnly(t)
	w := newTrustWorld(t)
	var file string
	must(0, w.db.QueryRow(t.Context(), getFileQuery).Scan(&file))
	other := must(sql.Open("sqlite3", "file:"+file+"?_txlock=immediate"))
	defer other.Close()
	must(w.db.Exec(t.Context(), "PRAGMA busy_timeout=1"))
	locked := must(other.Begin())
	stored := make(chan struct{})
	stateKey := ""
	evt := &event.Event{
		Type: event.StateEncryption, RoomID: "!locked:test", StateKey: &stateKey,
		Content: event.Content{Parsed: &event.EncryptionEventContent{Algorithm: id.AlgorithmMegolmV1}},
	}
	go func() {
		defer close(stored)
		w.hook.keepState(t.Context(), evt)
	}()
	select {
	case <-stored:
		t.Error("it was given up")
	case <-time.After(7 * time.Second):
	}
	must(0, locked.Rollback())
	<-stored
	if !must(w.hook.client.StateStore.IsEncrypted(t.Context(), "!locked:test")) {
		t.Error("the room is not known to be encrypted")
	}
}

// What somebody may do about a full disk, or another program, is told once and when it is over.
func TestTroubleIsToldOnceAndItsEnd(t *testing.T) {
	sqliteOnly(t)
	var log bytes.Buffer
	file := filepath.Join(t.TempDir(), "bot.db")
	db := openSQLiteFile(t, file, zerolog.New(&log))
	db.RawDB.SetMaxOpenConns(1)
	must(db.Exec(t.Context(), "CREATE TABLE some (text TEXT)"))
	must(db.Exec(t.Context(), "PRAGMA busy_timeout=1"))
	must(db.Exec(t.Context(), "PRAGMA max_page_count=3"))
	for range 3 {
		if _, err := db.Exec(t.Context(), "INSERT INTO some VALUES ($1)", strings.Repeat("x", 100_000)); err == nil {
			t.Fatal("it was stored")
		}
	}
	if told := strings.Count(log.String(), diskFull); told != 1 {
		t.Errorf("told %d times: %s", told, log.String())
	}
	must(db.Exec(t.Context(), "PRAGMA max_page_count=1000"))
	must(db.Exec(t.Context(), "INSERT INTO some VALUES ($1)", strings.Repeat("x", 100_000)))
	if told := strings.Count(log.String(), "The database can be written again"); told != 1 {
		t.Errorf("the end was told %d times: %s", told, log.String())
	}
}

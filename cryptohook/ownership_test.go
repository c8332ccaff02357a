package cryptohook

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
)

func openSQLite(t *testing.T, uri string) *dbutil.Database {
	t.Helper()
	db := must(dbutil.NewWithDialect(uri, safeDriver))
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// own gets the ownership for this test.
func own(t *testing.T, db *dbutil.Database) *Ownership {
	t.Helper()
	owner, err := Own(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = owner.Release() })
	return owner
}

func TestSecondOwnerOfAFileIsTold(t *testing.T) {
	dir := must(filepath.EvalSymlinks(t.TempDir()))
	file, link := filepath.Join(dir, "test.db"), filepath.Join(dir, "link.db")
	first := own(t, openSQLite(t, "file:"+file+"?_txlock=immediate"))
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, uri := range []string{file, "file:" + file, "file:" + link + "?_txlock=immediate"} {
		_, err := Own(t.Context(), openSQLite(t, uri))
		inUse, ok := errors.AsType[*DatabaseInUseError](err)
		if !ok || inUse.File != file || inUse.PID != os.Getpid() || !errors.Is(err, ErrNotOwner) {
			t.Errorf("%s: error %v", uri, err)
		}
	}
	if err := first.Err(); err != nil {
		t.Errorf("the first owner has lost the database: %v", err)
	}
	if err := first.Release(); err != nil {
		t.Error(err)
	}
	own(t, openSQLite(t, file))
}

func TestDatabasesInMemoryAreNotShared(t *testing.T) {
	own(t, openSQLite(t, ":memory:"))
	own(t, openSQLite(t, ":memory:"))
}

func TestHookOwnsItsDatabaseUntilItEnds(t *testing.T) {
	at := newDatabase(t)
	db := must(openDatabase(safeDriver, at))
	defer db.Close()
	other := must(openDatabase(safeDriver, at))
	defer other.Close()
	client := func() *mautrix.Client { return otherClient("@bot:test", "DEVICE") }
	owned := func() bool {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		owner, err := Own(ctx, other)
		if err == nil {
			err = owner.Release()
		} else if errors.Is(err, ErrNotOwner) || errors.Is(err, context.DeadlineExceeded) {
			return true
		}
		if err != nil {
			t.Fatal(err)
		}
		return false
	}
	hook, err := Install(t.Context(), client(), Options{DB: db, PickleKey: []byte("pickle")})
	if err != nil {
		t.Fatal(err)
	}
	if err = hook.Machine().CryptoStore.PutAccount(t.Context(), hook.Machine().GetAccount()); err != nil {
		t.Fatal(err)
	}
	if !owned() {
		t.Error("two processes could work with one database")
	}
	syncing := silence{begun: make(chan struct{}, 1)}
	hook.transport.base = syncing
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		<-syncing.begun
		cancel()
	}()
	if err = hook.Run(ctx); err != nil {
		t.Error(err)
	}
	if owned() {
		t.Error("the hook has ended, and still owns the database")
	}
	if _, err = Install(t.Context(), client(), Options{DB: db, PickleKey: []byte("another")}); !errors.Is(err, ErrPickleKey) {
		t.Errorf("error %v, want ErrPickleKey", err)
	}
	if owned() {
		t.Error("the hook could not be installed, and owns the database")
	}
}

// silence is a server that answers nothing.
type silence struct{ begun chan struct{} }

func (s silence) RoundTrip(req *http.Request) (*http.Response, error) {
	notify(s.begun)
	<-req.Context().Done()
	return nil, req.Context().Err()
}

func TestHookEndsWhenTheDatabaseIsLost(t *testing.T) {
	w := newTrustWorld(t)
	syncing := silence{begun: make(chan struct{}, 1)}
	w.hook.transport.base = syncing
	ended := make(chan error, 1)
	go func() { ended <- w.hook.Run(w.ctx) }()
	<-syncing.begun
	why := errors.New("why")
	_ = w.owner.lose(why)
	select {
	case err := <-ended:
		if !errors.Is(err, ErrNotOwner) || !errors.Is(err, why) || !strings.Contains(err.Error(), "another process owns the database") {
			t.Errorf("error %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the hook goes on")
	}
}

package disk

import (
	"bufio"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mattn/go-sqlite3"
	_ "go.mau.fi/util/dbutil/litestream" // the drivers that the bot uses
)

// The test binary is the program that loses its disk, when the variable names its driver and its database.
const childVariable = "DISK_TEST_DATABASE"

func TestMain(m *testing.M) {
	if database := os.Getenv(childVariable); database != "" {
		driver, file, _ := strings.Cut(database, "|")
		if err := fillDatabase(driver, file); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// fillDatabase commits rows for ever, and says each time which it was.
func fillDatabase(driver, file string) error {
	go func() {
		// The parent's end closes this pipe, whatever it died of.
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(2)
	}()
	db, err := sql.Open(driver, "file:"+file+"?_txlock=immediate")
	if err != nil {
		return err
	}
	if _, err = db.Exec("CREATE TABLE IF NOT EXISTS row (id INTEGER PRIMARY KEY, text TEXT); CREATE INDEX IF NOT EXISTS row_text ON row (text)"); err != nil {
		return err
	}
	var last int
	if err = db.QueryRow("SELECT COALESCE(MAX(id), 0) FROM row").Scan(&last); err != nil {
		return err
	}
	for id := last + 1; ; id++ {
		_, err = db.Exec("INSERT INTO row VALUES (?, ?)", id, strings.Repeat(strconv.Itoa(id), 100))
		if failed, ok := errors.AsType[sqlite3.Error](err); ok {
			fmt.Println("failed:", failed)
			id--
			continue
		} else if err != nil {
			return err
		}
		fmt.Println(id)
	}
}

// filler is the child.
type filler struct {
	t     *testing.T
	disk  *Disk
	file  string
	lines *bufio.Reader
	cmd   *exec.Cmd
	// committed is the last row that the child has committed.
	committed int
}

func newFiller(t *testing.T) *filler {
	t.Helper()
	if testing.Short() {
		t.Skip("needs gcc: not with -short")
	}
	dir := t.TempDir()
	disk := must(New(t.Context(), dir, t.TempDir()))(t)
	t.Cleanup(func() { ok(t, disk.Close()) })
	disk.SetSyncTime(100 * time.Microsecond)
	return &filler{t: t, disk: disk, file: filepath.Join(disk.Dir, "rows.db")}
}

func (f *filler) start(driver string) {
	f.t.Helper()
	f.cmd = exec.Command(must(os.Executable())(f.t))
	f.cmd.Env = append(os.Environ(), childVariable+"="+driver+"|"+f.file)
	f.cmd.Env = append(f.cmd.Env, f.disk.Env()...)
	f.cmd.Stderr = os.Stderr
	stdin := must(f.cmd.StdinPipe())(f.t)
	f.t.Cleanup(func() { _ = stdin.Close() })
	f.lines = bufio.NewReader(must(f.cmd.StdoutPipe())(f.t))
	ok(f.t, f.cmd.Start())
}

// read gives the child's next line, and notes what it has committed. It is empty at the end.
func (f *filler) read() string {
	line, err := f.lines.ReadString('\n')
	if err != nil {
		return ""
	}
	if id, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
		f.committed = id
	}
	return line
}

// kill ends the child, and reads what it said before.
func (f *filler) kill() {
	f.t.Helper()
	ok(f.t, f.cmd.Process.Kill())
	for f.read() != "" {
	}
	_ = f.cmd.Wait()
}

// check says what is wrong with the database.
func (f *filler) check() error {
	db := must(sql.Open("sqlite3", "file:"+f.file))(f.t)
	defer db.Close()
	var said string
	if err := db.QueryRow("PRAGMA integrity_check").Scan(&said); err != nil || said != "ok" {
		return fmt.Errorf("damaged: %s (%w)", said, err)
	}
	var rows, last int
	if err := db.QueryRow("SELECT COUNT(*), COALESCE(MAX(id), 0) FROM row").Scan(&rows, &last); err != nil {
		return err
	}
	if rows != last || last < f.committed {
		return fmt.Errorf("%d rows up to %d, and %d were committed", rows, last, f.committed)
	}
	f.committed = last
	return nil
}

// loseAgainAndAgain has the power fail so often, and gives the first fault.
func (f *filler) loseAgainAndAgain(driver string, tries int) (at int, err error) {
	f.t.Helper()
	var total Loss
	for try := range tries {
		f.start(driver)
		// From the database's making on, and across its checkpoints, which come every thousand pages.
		for range try * try {
			if f.read() == "" {
				f.t.Fatal("the child has ended")
			}
		}
		f.kill()
		loss := must(f.disk.LosePower(uint64(try)))(f.t)
		total.Unsynced, total.Lost = total.Unsynced+loss.Unsynced, total.Lost+loss.Lost
		if f.committed == 0 {
			continue
		}
		if err = f.check(); err != nil {
			return try, fmt.Errorf("seed %d, %+v: %w", try, loss, err)
		}
		ok(f.t, f.disk.Begin())
	}
	f.t.Logf("%d rows, %+v", f.committed, total)
	if total.Lost == 0 {
		f.t.Error("nothing was lost at all: does SQLite go by the disk?")
	}
	return tries, nil
}

const fullsync, normal = "sqlite3-fk-wal-fullsync", "sqlite3-fk-wal"

func TestCommittedRowsSurviveALossOfPower(t *testing.T) {
	t.Parallel()
	if _, err := newFiller(t).loseAgainAndAgain(fullsync, 30); err != nil {
		t.Error(err)
	}
}

// What shows that the test above can fail.
func TestWithoutSyncRowsAreLost(t *testing.T) {
	t.Parallel()
	f := newFiller(t)
	at, err := f.loseAgainAndAgain(normal, 30)
	if err == nil {
		t.Error("nothing was lost with synchronous=NORMAL")
	}
	t.Logf("synchronous=NORMAL, try %d: %v", at, err)

	f = newFiller(t)
	f.disk.SetLazy(true)
	if at, err = f.loseAgainAndAgain(fullsync, 30); err == nil {
		t.Error("nothing was lost on a disk that does not sync")
	}
	t.Logf("a disk that does not sync, try %d: %v", at, err)
}

func TestDiskIsFullOrReadOnlyWhileTheProgramRuns(t *testing.T) {
	t.Parallel()
	f := newFiller(t)
	f.start(fullsync)
	for _, test := range []struct {
		state State
		says  string
	}{
		{Full, "failed: database or disk is full"},
		{ReadOnly, "failed: disk I/O error: read-only file system"},
		{Broken, "failed: disk I/O error: input/output error"},
	} {
		for range 100 {
			f.read()
		}
		before := f.disk.Refusals()
		f.disk.Set(test.state)
		deadline := time.Now().Add(30 * time.Second)
		for line := ""; !strings.HasPrefix(line, test.says); line = f.read() {
			if time.Now().After(deadline) {
				t.Fatalf("%s, and not %q", line, test.says)
			}
		}
		if f.disk.Refusals() == before {
			t.Error("nothing was refused")
		}
		f.disk.Set(Fine)
		for committed := f.committed; f.committed < committed+100; {
			if f.read() == "" {
				t.Fatal("the child has ended")
			}
		}
	}
	f.kill()
	ok(t, f.check())
}

func TestMediumKeepsWhatWasSynced(t *testing.T) {
	t.Parallel()
	old, new := strings.Repeat("o", 2*sector), strings.Repeat("n", 2*sector)
	write := func(file uint32, offset int, text string) entry {
		return entry{kind: written, file: file, offset: uint64(offset), data: []byte(text)}
	}
	sawOld, sawNew, sawTorn, sawFile, sawNoFile := 0, 0, 0, 0, 0
	for seed := range uint64(200) {
		m := newMedium(map[string][]byte{"a": []byte("before")})
		for _, e := range []entry{
			{kind: opened, file: 1, data: []byte("a")},
			write(1, 0, old), {kind: synced, file: 1, offset: 2}, write(1, 0, new), {kind: synced, file: 1, offset: 3},
			{kind: created, file: 2, data: []byte("b")}, write(2, 0, "safe"), {kind: synced, file: 2, offset: 7},
		} {
			ok(t, m.apply(e))
		}
		left, _ := m.losePower(seed)
		switch a := string(left["a"]); {
		case a == old:
			sawOld++
		case a == new:
			sawNew++
		case a == old[:sector]+new[:sector] || a == new[:sector]+old[:sector]:
			sawTorn++
		default:
			t.Fatalf("seed %d: %q", seed, a)
		}
		// The file is synced, and its name is not.
		if b, there := left["b"]; !there {
			sawNoFile++
		} else if sawFile++; string(b) != "safe" {
			t.Fatalf("seed %d: %q", seed, b)
		}
		ok(t, m.apply(entry{kind: syncedDir, offset: 7}))
		if left, _ = m.losePower(seed); string(left["b"]) != "safe" {
			t.Fatalf("seed %d: a synced file with a synced name is %q", seed, left["b"])
		}
	}
	if sawOld*sawNew*sawTorn*sawFile*sawNoFile == 0 {
		t.Errorf("old %d, new %d, torn %d, file %d, no file %d: each has to be seen", sawOld, sawNew, sawTorn, sawFile, sawNoFile)
	}
}

func must[T any](value T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		ok(t, err)
		return value
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

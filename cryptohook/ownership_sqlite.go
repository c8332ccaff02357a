package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
)

// DatabaseInUseError says which SQLite database another process works with.
type DatabaseInUseError struct {
	File string
	// PID is the other process; zero when it is not known.
	PID int
}

func (e *DatabaseInUseError) Error() string {
	holder := "another process"
	if e.PID > 0 {
		holder = fmt.Sprintf("process %d", e.PID)
	}
	return fmt.Sprintf("the database %s is in use by %s, and only one may work with it; stop that one, or use a database of your own", e.File, holder)
}

// Unwrap makes it an [ErrNotOwner].
func (e *DatabaseInUseError) Unwrap() error { return ErrNotOwner }

// lockSuffix makes the name of the file whose lock stands for the database. SQLite's own file cannot be locked: whoever closes it
// gives up all locks that its process has on it, SQLite's too.
const lockSuffix = ".lock"

// logSuffix makes the name of the file into which SQLite writes first.
const logSuffix = "-wal"

// journalSuffix makes the name of the file that undoes what SQLite has begun to write without the log, as it does in a new database.
const journalSuffix = "-journal"

const (
	// filledMark is written into the lock's file when the database has got its tables, below the process's number: then an empty file
	// is no new database.
	filledMark  = "filled"
	longestLock = 64
)

// ownFile locks the database's file for this process. The system frees the lock when the process ends, however that comes about,
// and the file of the lock stays: deleting it would let two processes have a lock each.
func ownFile(ctx context.Context, db *dbutil.Database) (*Ownership, error) {
	owned := newOwnership()
	file, err := databaseFile(ctx, db)
	if err != nil {
		return nil, fmt.Errorf("failed to find the database's file: %w", err)
	} else if file == "" {
		return owned, nil
	}
	lock, err := os.OpenFile(file+lockSuffix, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("failed to lock the database: %w", err)
	}
	owned.release = lock.Close
	err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, errors.Join(&DatabaseInUseError{File: file, PID: readPID(lock)}, lock.Close())
	} else if err == nil {
		err = writePID(lock, wasFilled(file))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("failed to lock %s: %w", lock.Name(), err), lock.Close())
	}
	if err = checkStart(ctx, db); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if pool, ok := db.RawDB.Driver().(*sqlitePool); ok {
		pool.owner.Store(owned)
	}
	owned.filled = func() {
		if _, err := lock.WriteAt([]byte(lockText(true)), 0); err != nil {
			zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to note that the database has got its tables")
		}
	}
	return owned, nil
}

const getFileQuery = `SELECT file FROM pragma_database_list WHERE name='main'`

// databaseFile gives the file of an SQLite database, by the name that it has without links; nothing for one in memory.
func databaseFile(ctx context.Context, db *dbutil.Database) (file string, err error) {
	err = db.QueryRow(ctx, getFileQuery).Scan(&file)
	return file, err
}

// readPID gives the process in the lock's first line; zero when there is none.
func readPID(lock io.Reader) int {
	written, err := io.ReadAll(io.LimitReader(lock, longestLock))
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(written), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return 0
	}
	return pid
}

// writePID notes who has the lock, and leaves the note that the database has got its tables.
func writePID(lock *os.File, filled bool) error {
	if err := lock.Truncate(0); err != nil {
		return err
	}
	_, err := lock.WriteAt([]byte(lockText(filled)), 0)
	return err
}

func lockText(filled bool) string {
	text := strconv.Itoa(os.Getpid()) + "\n"
	if filled {
		text += filledMark + "\n"
	}
	return text
}

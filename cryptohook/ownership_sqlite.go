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
		err = writePID(lock)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("failed to lock %s: %w", lock.Name(), err), lock.Close())
	}
	return owned, nil
}

const getFileQuery = `SELECT file FROM pragma_database_list WHERE name='main'`

// databaseFile gives the file of an SQLite database, by the name that it has without links; nothing for one in memory.
func databaseFile(ctx context.Context, db *dbutil.Database) (file string, err error) {
	err = db.QueryRow(ctx, getFileQuery).Scan(&file)
	return file, err
}

func readPID(lock io.Reader) int {
	written, err := io.ReadAll(io.LimitReader(lock, 20))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(written)))
	if err != nil {
		return 0
	}
	return pid
}

func writePID(lock *os.File) error {
	if err := lock.Truncate(0); err != nil {
		return err
	}
	_, err := lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

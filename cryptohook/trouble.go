package cryptohook

import (
	"sync"
	"syscall"
	"time"

	"github.com/mattn/go-sqlite3"
	"github.com/rs/zerolog"
)

// trouble is what keeps an SQLite database from being written, and will be over some day. Everybody who writes tries again; here it is
// told once, and every minute that it lasts, what somebody may do about it.
type trouble struct {
	log zerolog.Logger

	mu    sync.Mutex
	what  string
	since time.Time
	told  time.Time
}

const troubleReminder = time.Minute

// The causes of trouble, as they are told.
const (
	diskFull     = "The disk that holds the database is full. Make room on it: nothing is lost meanwhile, and the program goes on by itself"
	diskReadOnly = "The database cannot be written: its file, or its disk, is read-only. Make it writable: nothing is lost meanwhile, and the program goes on by itself"
	diskBroken   = "The disk that holds the database gives errors. See to it: nothing is lost meanwhile, and the program goes on by itself"
	lockedByAny  = "Another program keeps the database locked, and only this one is to work with it. End that one: nothing is lost meanwhile, and the program goes on by itself"
)

func causeOf(failed sqlite3.Error) string {
	switch failed.Code {
	case sqlite3.ErrFull:
		return diskFull
	case sqlite3.ErrReadonly:
		return diskReadOnly
	case sqlite3.ErrBusy:
		return lockedByAny
	case sqlite3.ErrIoErr:
		switch failed.SystemErrno {
		case syscall.ENOSPC, syscall.EDQUOT:
			return diskFull
		case syscall.EROFS, syscall.EACCES, syscall.EPERM:
			return diskReadOnly
		}
		return diskBroken
	default:
		return ""
	}
}

func (t *trouble) begin(failed sqlite3.Error) {
	what := causeOf(failed)
	if what == "" {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if t.what == "" {
		t.since = now
	} else if t.what == what && now.Sub(t.told) < troubleReminder {
		return
	}
	t.what, t.told = what, now
	t.log.Error().Err(failed).Msg(what)
}

// end is called after something was written.
func (t *trouble) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.what == "" {
		return
	}
	t.log.Info().Dur("after", time.Since(t.since)).Msg("The database can be written again")
	t.what = ""
}

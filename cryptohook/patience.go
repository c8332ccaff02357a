package cryptohook

import (
	"context"
	"errors"
	"time"

	"github.com/mattn/go-sqlite3"
	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// What a room's state has become comes once, with one /sync, and mautrix only logs it when its stores fail: a room would then not be known
// to be encrypted, or a member who has left would be sent keys. So what these stores fail at is tried until it goes; and if the process
// ends before that, the unit of work of that /sync is broken, and it is delivered again.

const (
	firstStorageRetry = 50 * time.Millisecond
	maxStorageRetry   = 5 * time.Second
)

// Patiently calls a function that works with the database until that works, the context ends, or trying is no use. It is for what must
// not be left out since the disk is full for a while, or a server away.
func Patiently(ctx context.Context, db *dbutil.Database, fn func() error) error {
	for wait := firstStorageRetry; ; wait = min(2*wait, maxStorageRetry) {
		err := fn()
		if err == nil || !mayPass(db, err) {
			return err
		}
		zerolog.Ctx(ctx).Warn().Err(err).Dur("retry_in", wait).Msg("The database fails, trying again")
		if await(ctx, wait) != nil {
			return err
		}
	}
}

// await waits before something is tried again. An error is the context's end.
func await(ctx context.Context, wait time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(wait):
		return nil
	}
}

// mayPass says that the error is the database's state and not what it was asked for: a full disk, a server that is away.
func mayPass(db *dbutil.Database, err error) bool {
	if errors.Is(err, ErrNotOwner) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	} else if db.Dialect == dbutil.Postgres {
		return !isRefused(err)
	}
	failed, ok := errors.AsType[sqlite3.Error](err)
	if !ok {
		return false
	}
	switch failed.Code {
	case sqlite3.ErrFull, sqlite3.ErrReadonly, sqlite3.ErrBusy, sqlite3.ErrIoErr, sqlite3.ErrCantOpen, sqlite3.ErrLocked, sqlite3.ErrProtocol, sqlite3.ErrNomem:
		return true
	}
	return false
}

// keepState notes what the state of a room has become, as [mautrix.Client.StateStoreSyncHandler] does.
func (h *Hook) keepState(ctx context.Context, evt *event.Event) {
	if _, own := h.client.StateStore.(mautrix.StateStoreUpdater); own {
		mautrix.UpdateStateStore(ctx, h.client.StateStore, evt)
		return
	}
	err := Patiently(ctx, h.store.Database, func() error {
		attempt := &stateAttempt{StateStore: h.client.StateStore}
		mautrix.UpdateStateStore(ctx, attempt, evt)
		return attempt.err
	})
	h.uow.orBreak(ctx, err)
}

// orBreak has what came with a /sync delivered again, if it could not be stored before the end of the process or of its database.
func (u *unitOfWork) orBreak(ctx context.Context, err error) {
	_, damaged := errors.AsType[*DamagedError](err)
	if err != nil && (damaged || errors.Is(err, ErrNotOwner) || errors.Is(ctx.Err(), context.Canceled)) {
		_ = u.breakWith(err)
	}
}

// stateAttempt notes whether a store has failed.
type stateAttempt struct {
	mautrix.StateStore
	err error
}

func (a *stateAttempt) note(err error) error {
	a.err = err
	return err
}

func (a *stateAttempt) SetMember(ctx context.Context, roomID id.RoomID, userID id.UserID, member *event.MemberEventContent) error {
	return a.note(a.StateStore.SetMember(ctx, roomID, userID, member))
}

func (a *stateAttempt) SetPowerLevels(ctx context.Context, roomID id.RoomID, levels *event.PowerLevelsEventContent) error {
	return a.note(a.StateStore.SetPowerLevels(ctx, roomID, levels))
}

func (a *stateAttempt) SetEncryptionEvent(ctx context.Context, roomID id.RoomID, content *event.EncryptionEventContent) error {
	return a.note(a.StateStore.SetEncryptionEvent(ctx, roomID, content))
}

func (a *stateAttempt) SetCreate(ctx context.Context, evt *event.Event) error {
	return a.note(a.StateStore.SetCreate(ctx, evt))
}

func (a *stateAttempt) SetJoinRules(ctx context.Context, roomID id.RoomID, content *event.JoinRulesEventContent) error {
	return a.note(a.StateStore.SetJoinRules(ctx, roomID, content))
}

func (a *stateAttempt) SetHistoryVisibility(ctx context.Context, roomID id.RoomID, content *event.HistoryVisibilityEventContent) error {
	return a.note(a.StateStore.SetHistoryVisibility(ctx, roomID, content))
}

// patientState is the store of rooms' state as the machine has it: which rooms lose their session when a member leaves, or gets a device,
// must not depend on the database's working at that moment.
type patientState struct {
	crypto.StateStore
	hook *Hook
}

func (s patientState) IsEncrypted(ctx context.Context, roomID id.RoomID) (encrypted bool, err error) {
	err = Patiently(ctx, s.hook.store.Database, func() (err error) {
		encrypted, err = s.StateStore.IsEncrypted(ctx, roomID)
		return err
	})
	s.hook.uow.orBreak(ctx, err)
	return encrypted, err
}

func (s patientState) FindSharedRooms(ctx context.Context, userID id.UserID) (rooms []id.RoomID, err error) {
	err = Patiently(ctx, s.hook.store.Database, func() (err error) {
		rooms, err = s.StateStore.FindSharedRooms(ctx, userID)
		return err
	})
	return rooms, err
}

// RemoveOutboundGroupSession implements [crypto.Store]: the next message to the room gets a new session. mautrix asks for it when somebody
// leaves, and goes on if it fails.
func (u *unitOfWork) RemoveOutboundGroupSession(ctx context.Context, roomID id.RoomID) error {
	err := Patiently(ctx, u.DB, func() error { return u.SQLCryptoStore.RemoveOutboundGroupSession(ctx, roomID) })
	u.orBreak(ctx, err)
	return err
}

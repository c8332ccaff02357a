package cryptohook

import (
	"context"
	"errors"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// mautrix guards Olm sessions by a lock of its own machine, which it does not lend. EncryptToDevices asks the store for the recipient's last
// session while it holds that lock: so encrypting to a device that there is not runs what is to be run under the lock, and then fails. The
// context says that it is such a call, and the store answers by it.

const (
	lockUser   id.UserID      = "@:"
	lockDevice id.DeviceID    = "lock"
	lockKey    id.IdentityKey = "lock"
)

// errOlmLockHeld ends the call whose only purpose was the lock.
var errOlmLockHeld = errors.New("this was for the lock only")

// lockHolder is what runs under the lock.
type lockHolder struct {
	work func()
	ran  bool
}

func lockHolderOf(ctx context.Context) *lockHolder {
	holder, _ := ctx.Value(lockingKey).(*lockHolder)
	return holder
}

// withOlmLock runs work while no Olm session is used by anybody else. It must not call mautrix's machine for anything that takes the lock.
func (h *Hook) withOlmLock(ctx context.Context, work func()) error {
	holder := &lockHolder{work: work}
	_, err := h.mach.EncryptToDevices(context.WithValue(ctx, lockingKey, holder), event.ToDeviceDummy, &mautrix.ReqSendToDevice{
		Messages: map[id.UserID]map[id.DeviceID]*event.Content{lockUser: {lockDevice: {}}},
	})
	if holder.ran {
		return nil
	} else if err == nil {
		err = ErrNoInterception
	}
	return err
}

// GetDevice gives the device that there is not to a call for the lock.
func (u *unitOfWork) GetDevice(ctx context.Context, userID id.UserID, deviceID id.DeviceID) (*id.Device, error) {
	if lockHolderOf(ctx) != nil {
		return &id.Device{UserID: userID, DeviceID: deviceID, IdentityKey: lockKey}, nil
	}
	return u.SQLCryptoStore.GetDevice(ctx, userID, deviceID)
}

// runLocked runs what a call for the lock is for.
func (holder *lockHolder) runLocked() error {
	holder.ran = true
	holder.work()
	return errOlmLockHeld
}

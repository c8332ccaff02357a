package cryptohook

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// What will be asked of the senders of one /sync is asked for all of them at its beginning, in a statement for each kind of thing. One after the
// other each device would take several, which on PostgreSQL are a round trip each.

const (
	getDevicesOfSendersQuery = `
		SELECT user_id, device_id, identity_key, signing_key, trust, deleted, name FROM crypto_device WHERE user_id IN ($1) AND identity_key IN ($2)
	`
	getListsOfSendersQuery = `SELECT user_id FROM crypto_tracked_user WHERE devices_outdated=false AND user_id IN ($1)`
)

// sendersPerStatement is how many senders a statement asks about, by their users and by their devices' keys.
const sendersPerStatement = perStatement / 2

// lookUpSenders asks for the devices, identities and Olm sessions of who has sent the Olm messages of this /sync.
func (r *receiving) lookUpSenders(ctx context.Context) error {
	devices := make(map[deviceOfKey]struct{})
	for _, m := range r.messages {
		devices[deviceOfKey{m.evt.Sender, m.senderKey}] = struct{}{}
	}
	if len(devices) < 2 {
		return nil
	}
	r.renew()
	for some := range slices.Chunk(slices.Collect(maps.Keys(devices)), sendersPerStatement) {
		senders, senderKeys := make(map[id.UserID]struct{}), make(map[id.SenderKey]struct{})
		for _, device := range some {
			senders[device.userID], senderKeys[device.key] = struct{}{}, struct{}{}
		}
		users, keys := slices.Collect(maps.Keys(senders)), slices.Collect(maps.Keys(senderKeys))
		if err := r.lookUpUsers(ctx, users); err != nil {
			return fmt.Errorf("failed to look up what is known of senders: %w", err)
		}
		if err := r.lookUpDevices(ctx, some, users, keys); err != nil {
			return fmt.Errorf("failed to look up the devices of senders: %w", err)
		}
		r.hook.uow.lookUpOlmSessions(ctx, keys)
	}
	return nil
}

// lookUpUsers keeps the users' identities, and whether their device lists are current.
func (r *receiving) lookUpUsers(ctx context.Context, users []id.UserID) error {
	identities, err := r.hook.store.identities(ctx, users)
	if err != nil {
		return err
	}
	for _, userID := range users {
		r.users[userID] = knownUser{identity: identities[userID]}
	}
	current, err := queryAll(ctx, r.hook.store, getListsOfSendersQuery, users, dbutil.ScanSingleColumn[id.UserID])
	for _, userID := range current {
		r.users[userID] = knownUser{identity: identities[userID], current: true}
	}
	return err
}

// lookUpDevices keeps what mautrix's store has under the devices' keys. Of several under one key it would choose: those are left to it.
func (r *receiving) lookUpDevices(ctx context.Context, wanted []deviceOfKey, users []id.UserID, keys []id.SenderKey) error {
	query, params := withTwo(getDevicesOfSendersQuery, users, keys)
	rows, err := r.hook.store.Query(ctx, query, params...)
	found, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (*id.Device, error) {
		var d id.Device
		return &d, row.Scan(&d.UserID, &d.DeviceID, &d.IdentityKey, &d.SigningKey, &d.Trust, &d.Deleted, &d.Name)
	}, err).AsList()
	if err != nil {
		return err
	}
	devices := make(map[deviceOfKey][]*id.Device, len(found))
	for _, device := range found {
		key := deviceOfKey{device.UserID, device.IdentityKey}
		devices[key] = append(devices[key], device)
	}
	for _, key := range wanted {
		switch under := devices[key]; len(under) {
		case 0:
			r.devices[key] = nil
		case 1:
			r.devices[key] = under[0]
		}
	}
	return nil
}

// knownUser is what was looked up of a user.
type knownUser struct {
	identity *Identity
	current  bool
}

// lookedUp are a walk's caches of which a part was looked up before.
type lookedUp struct {
	*store
	users map[id.UserID]knownUser
}

// cachesFor gives what a walk may look at. The caller has just renewed what was looked up; without a receiver nothing was.
func (r *receiving) cachesFor(s *store) lookedUp {
	if r == nil {
		return lookedUp{store: s}
	}
	return lookedUp{s, r.users}
}

func (l lookedUp) identity(ctx context.Context, userID id.UserID) (*Identity, error) {
	if user, looked := l.users[userID]; looked {
		return user.identity, nil
	}
	return l.store.identity(ctx, userID)
}

func (l lookedUp) deviceListCurrent(ctx context.Context, userID id.UserID) (bool, error) {
	if user, looked := l.users[userID]; looked {
		return user.current, nil
	}
	return l.store.deviceListCurrent(ctx, userID)
}

package cryptohook

import (
	"context"
	"crypto/sha256"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// What the room keys of one /sync share, so that it is looked up and worked out once: a device that sends a hundred keys sends its own keys a
// hundred times.

// receiving is what was looked up and worked out while one /sync is being received. Nothing is written meanwhile by the receiver; what others
// learn about users' keys makes it void. Only the receiving goroutine touches it. It goes with the context of a message.
type receiving struct {
	hook *Hook
	// known is what walks and devices rest on.
	known   knowledge
	walks   map[senderOfWalk]*derivation
	devices map[deviceOfKey]*id.Device
	// users are those who were looked up at the beginning.
	users map[id.UserID]knownUser
	// hashes are the Olm messages that were asked for, with the time at which they were received before, if they were.
	hashes map[[sha256.Size]byte]time.Time
	// messages are the Olm messages in the events.
	messages map[*event.Event]*olmMessage
	// oneByOne says that nothing more of the /sync is to be received together, and pause that so many events are not, after attempts that
	// were in vain.
	oneByOne      bool
	pause, inVain int
	// absent are sessions of which nothing is stored: as many were stored at once as absentAt says when that was looked up.
	absent   sessionSet
	absentAt uint64
	// rooms are the encryption settings that were asked for; nil for a room that has none.
	rooms map[id.RoomID]*event.EncryptionEventContent
}

// deviceOfKey is what mautrix asks for a device by.
type deviceOfKey struct {
	userID id.UserID
	key    id.IdentityKey
}

// senderOfWalk is what a walk rests on: keys that share it are derived alike.
type senderOfWalk struct {
	sender id.UserID
	walkKey
}

func newReceiving(h *Hook) *receiving {
	return &receiving{
		hook: h, walks: make(map[senderOfWalk]*derivation), devices: make(map[deviceOfKey]*id.Device), users: make(map[id.UserID]knownUser),
		messages: make(map[*event.Event]*olmMessage), hashes: make(map[[sha256.Size]byte]time.Time), rooms: make(map[id.RoomID]*event.EncryptionEventContent),
	}
}

// context marks the context of a message that is being received. It is given to HandleEncryptedEvent and to our own storing only, for
// mautrix takes contexts along into goroutines.
func (r *receiving) context(ctx context.Context) context.Context {
	return context.WithValue(ctx, receivingKey, r)
}

// receivingOf gives what goes with the context; nil if nothing does.
func receivingOf(ctx context.Context) *receiving {
	r, _ := ctx.Value(receivingKey).(*receiving)
	return r
}

// renew makes void what rests on users' keys if something was learnt about them.
func (r *receiving) renew() {
	if r.known.outdated(r.hook) {
		clear(r.walks)
		clear(r.devices)
		clear(r.users)
		r.known = r.hook.knowledge()
	}
}

// walkOf gives the walk through the steps that fits a key that is arriving, if there was one in this batch, and nothing was learnt since.
func (r *receiving) walkOf(key senderOfWalk) *derivation {
	if r == nil {
		return nil
	}
	r.renew()
	return r.walks[key]
}

// keep keeps a walk for those that are like it. What was learnt since walkOf makes it void with the others.
func (r *receiving) keep(key senderOfWalk, walk *derivation) {
	if r != nil {
		r.walks[key] = walk
	}
}

const getOlmHashesQuery = `SELECT message_hash, received_at FROM crypto_olm_message_hash WHERE message_hash IN ($1)`

// lookUpHashes reads the events' Olm messages, and asks which of them were received before, in one statement. Nobody else receives, so it stays true.
func (r *receiving) lookUpHashes(ctx context.Context, events []*event.Event) error {
	var wanted [][]byte
	for _, evt := range events {
		if m := r.hook.olmMessageIn(evt); m != nil {
			r.messages[evt] = m
			r.hashes[m.hash] = time.Time{}
			wanted = append(wanted, m.hash[:])
		}
	}
	type receivedHash struct {
		hash       []byte
		receivedAt int64
	}
	for some := range slices.Chunk(wanted, perStatement) {
		known, err := queryAll(ctx, r.hook.store, getOlmHashesQuery, some, func(row dbutil.Scannable) (k receivedHash, err error) {
			return k, row.Scan(&k.hash, &k.receivedAt)
		})
		if err != nil {
			return fmt.Errorf("failed to look up which Olm messages were received before: %w", err)
		}
		for _, k := range known {
			if len(k.hash) == sha256.Size {
				r.hashes[[sha256.Size]byte(k.hash)] = time.UnixMilli(k.receivedAt)
			}
		}
	}
	return nil
}

// receivedAt says when an Olm message was received before, or not at all; looked is no if that was not looked up.
func (r *receiving) receivedAt(hash [sha256.Size]byte) (at time.Time, looked bool) {
	if r == nil {
		return time.Time{}, false
	}
	at, looked = r.hashes[hash]
	return at, looked
}

const getStoredSessionsQuery = `
	SELECT session_id FROM crypto_megolm_inbound_session
	WHERE account_id IN (SELECT account_id FROM crypto_account) AND session_id IN ($1)
`

// lookUpSessions asks of which of the sessions in the room keys nothing is stored, in one statement. What is staged may be stored at any time.
func (r *receiving) lookUpSessions(ctx context.Context, keys ...*arrivedKey) (err error) {
	if r == nil {
		return nil
	}
	begun, settled := r.hook.uow.direct.now()
	r.absent, r.absentAt = nil, begun
	if !settled {
		return nil
	}
	var sessions []id.SessionID
	for _, key := range keys {
		if megolm := key.session; megolm != nil && r.hook.uow.stagedGroup(megolm.ID()) == nil {
			sessions = append(sessions, megolm.ID())
		}
	}
	r.absent, err = r.hook.store.without(ctx, getStoredSessionsQuery, sessions)
	return err
}

// isAbsent says that it is known that nothing is stored of the session, nor staged. Under mautrix's Megolm lock, which everybody holds who looks
// whether a session is there and then stores it, that stays so until the caller stores it.
func (r *receiving) isAbsent(sessionID id.SessionID) bool {
	if r == nil {
		return false
	}
	begun, _ := r.hook.uow.direct.now()
	return begun == r.absentAt && r.absent.has(sessionID)
}

// stored notes that the session is staged now.
func (r *receiving) stored(sessionID id.SessionID) {
	if r != nil {
		delete(r.absent, sessionID)
	}
}

// received notes that an Olm message was received: the same one may be in the same /sync again.
func (r *receiving) received(hash [sha256.Size]byte, at time.Time) {
	if r != nil {
		r.hashes[hash] = at
	}
}

// device gives the device that mautrix's store has under a key, as find finds it at the first time.
func (r *receiving) device(key deviceOfKey, find func() (*id.Device, error)) (*id.Device, error) {
	if r == nil {
		return find()
	}
	r.renew()
	device, looked := r.devices[key]
	if !looked {
		var err error
		if device, err = find(); err != nil {
			return nil, err
		}
		r.devices[key] = device
	}
	if device == nil {
		return nil, nil
	}
	copied := *device // mautrix writes into what it gets
	return &copied, nil
}

// encryption gives the encryption settings of a room.
func (r *receiving) encryption(ctx context.Context, roomID id.RoomID) (*event.EncryptionEventContent, error) {
	config, looked := r.rooms[roomID]
	if looked {
		return config, nil
	}
	config, err := r.hook.mach.StateStore.GetEncryptionEvent(ctx, roomID)
	if err == nil {
		r.rooms[roomID] = config
	}
	return config, err
}

// sideBySide does something for each of so many numbers, on all processors. It panics as any of it does.
func sideBySide(count int, do func(i int)) {
	workers := min(count, runtime.GOMAXPROCS(0))
	var group sync.WaitGroup
	panics := make(chan any, workers)
	for first := range workers {
		group.Go(func() {
			defer func() {
				if reason := recover(); reason != nil {
					panics <- reason
				}
			}()
			for i := first; i < count; i += workers {
				do(i)
			}
		})
	}
	group.Wait()
	select {
	case reason := <-panics:
		panic(reason)
	default:
	}
}

// noteSigners notes a device and who has signed it, and says whether any of it is news. What was noted stays: nobody takes it away.
func (h *Hook) noteSigners(ctx context.Context, claim *SenderData) (news bool, err error) {
	digest := digestOfSigners(claim)
	if noted, _ := h.store.noted.look(digest); noted {
		return false, nil
	}
	if news, err = h.store.noteSigners(ctx, claim); err != nil {
		return news, fmt.Errorf("failed to note whose session %s is: %w", claim.SessionID, err)
	}
	h.store.noted.keep(digest, true)
	return news, nil
}

// digestOfSigners is a hash of all that [store.noteSigners] notes of a claim.
func digestOfSigners(claim *SenderData) digest {
	parts := []string{claim.Sender.String(), claim.SenderKey.String(), claim.SigningKey.String()}
	for _, signer := range claim.signers {
		parts = append(parts, signer.key.String(), string(signer.object))
	}
	return hashOfParts(parts...)
}

// forgetTransaction forgets what was done in the transaction that is open: a part of it was rolled back.
func (h *Hook) forgetTransaction() {
	h.store.noted.clear()
	h.judgedPending = pendingJudged{}
}

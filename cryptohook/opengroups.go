package cryptohook

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"strings"
	"sync"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// openGroups are the Megolm sessions that room events were decrypted with last, so that the next event of a session need not open its pickle
// and move its ratchet on from where that was stored.
//
// They are no copies of the database: whether there is a key, for which room, whose, and which one, is read from it for each event. What is
// kept is only what a pickle holds that is stored now, byte by byte. So nobody who changes a session has to know of this.
type openGroups struct {
	*generations[id.SessionID, *openGroup]
}

// groupsInGeneration is how many sessions are in a generation: about 1.5 KiB each.
const groupsInGeneration = 300

func newOpenGroups() *openGroups {
	return &openGroups{newGenerations[id.SessionID](groupsInGeneration, each[*openGroup])}
}

// openGroup is a session's pickle, opened.
type openGroup struct {
	pickle, pickleKey []byte

	mu sync.Mutex
	olm.InboundGroupSession
	// astray says that the ratchet was moved to where it may not open all that the pickle does.
	astray bool

	// highest is the highest message index that is stored or staged for the session, if that is known: see isAboveAll. It is guarded by the unit
	// of work's mu.
	highest      int64
	highestKnown bool
}

// open gives what is in the pickle of a session.
func (o *openGroups) open(sessionID id.SessionID, pickle, pickleKey []byte) (*openGroup, error) {
	if group, isOpen := o.look(sessionID); isOpen && group.holds(pickle) {
		return group, nil
	}
	internal, err := unpickle(pickle, pickleKey)
	if err != nil {
		return nil, err
	}
	group := &openGroup{pickle: pickle, pickleKey: pickleKey, InboundGroupSession: internal}
	o.keep(sessionID, group)
	return group, nil
}

func unpickle(pickle, pickleKey []byte) (olm.InboundGroupSession, error) {
	internal := olm.NewBlankInboundGroupSession()
	if err := internal.Unpickle(pickle, pickleKey); err != nil {
		return nil, err
	}
	return internal, nil
}

func (g *openGroup) holds(pickle []byte) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.astray && bytes.Equal(g.pickle, pickle)
}

// farAhead is how far a ratchet may be moved from the first index that it knows. libolm and its likes compare indices by their distance, of which
// one half is ahead and one behind: nearer than this, whatever the pickle opens is opened.
const farAhead = 1 << 30

// Decrypt implements [olm.InboundGroupSession], for several at once: it is the only method that mautrix calls of a session to decrypt with and
// that changes anything. It has the result that a session has whose pickle was just opened.
func (g *openGroup) Decrypt(ciphertext []byte) (plaintext []byte, index uint, err error) {
	plaintext, index, same, err := g.tryDecrypt(ciphertext)
	if same {
		return plaintext, index, err
	}
	anew, err := unpickle(g.pickle, g.pickleKey)
	if err != nil {
		return nil, 0, err
	}
	return anew.Decrypt(ciphertext)
}

// tryDecrypt says whether the result is the same as that of a session whose pickle was just opened. If it is not, or may not be, nobody gets
// this one any more.
func (g *openGroup) tryDecrypt(ciphertext []byte) (plaintext []byte, index uint, same bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	plaintext, index, err = g.InboundGroupSession.Decrypt(ciphertext)
	switch {
	case err == nil:
		same = uint32(index)-g.FirstKnownIndex() < farAhead
	default: // these two come before the ratchet is moved
		same = errors.Is(err, olm.ErrUnknownMessageIndex) || errors.Is(err, olm.ErrBadSignature)
	}
	g.astray = g.astray || !same
	return plaintext, index, same, err
}

// getGroupQuery is mautrix's own, but for what it reads and does not use.
const getGroupQuery = `
	SELECT sender_key, signing_key, session, forwarding_chains, withheld_code, shared_history, received_at, max_age, max_messages,
	       is_scheduled, key_backup_version, key_source, source_user
	FROM crypto_megolm_inbound_session WHERE room_id=$1 AND session_id=$2 AND account_id=$3
`

// groupToDecrypt is GetGroupSession of mautrix's store for the decrypting of a room event.
func (u *unitOfWork) groupToDecrypt(ctx context.Context, roomID id.RoomID, sessionID id.SessionID) (*crypto.InboundGroupSession, error) {
	session := crypto.InboundGroupSession{RoomID: roomID, ForwardingChains: []string{}}
	var senderKey, signingKey, chains, withheldCode sql.NullString
	var receivedAt sql.NullTime
	var maxAge, maxMessages sql.NullInt64
	var pickle []byte
	err := u.DB.QueryRow(ctx, getGroupQuery, roomID, sessionID, u.AccountID).Scan(
		&senderKey, &signingKey, &pickle, &chains, &withheldCode, &session.SharedHistory, &receivedAt, &maxAge, &maxMessages,
		&session.IsScheduled, &session.KeyBackupVersion, &session.KeySource, &session.SourceUser,
	)
	if err != nil {
		return nil, ignoreNoRows(err)
	} else if withheldCode.Valid {
		return u.SQLCryptoStore.GetGroupSession(ctx, roomID, sessionID)
	}
	if session.Internal, err = u.open.open(sessionID, pickle, u.PickleKey); err != nil {
		return nil, err
	}
	if chains.String != "" {
		session.ForwardingChains = strings.Split(chains.String, ",")
	}
	session.SenderKey, session.SigningKey = id.SenderKey(senderKey.String), id.Ed25519(signingKey.String)
	session.ReceivedAt, session.MaxAge, session.MaxMessages = receivedAt.Time, maxAge.Int64, int(maxMessages.Int64)
	return &session, nil
}

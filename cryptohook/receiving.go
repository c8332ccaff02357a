package cryptohook

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// What the room keys of one /sync share, so that it is worked out once: a device that sends a hundred keys sends its own keys a hundred times.

// receiving is what was worked out while one /sync is being received. Nothing is written meanwhile by the receiver; what others learn makes it
// void. Only the receiving goroutine touches it.
type receiving struct {
	hook  *Hook
	known knowledge
	walks map[senderOfWalk]*derivation
}

// senderOfWalk is what a walk rests on: keys that share it are derived alike.
type senderOfWalk struct {
	sender id.UserID
	walkKey
}

func newReceiving(h *Hook) *receiving { return &receiving{hook: h} }

// walkOf gives the walk through the steps that fits a key that is arriving, if there was one in this batch, and nothing was learnt since.
func (r *receiving) walkOf(key senderOfWalk) *derivation {
	if r == nil {
		return nil
	}
	if r.walks == nil || r.known.outdated(r.hook) {
		r.walks, r.known = make(map[senderOfWalk]*derivation), r.hook.knowledge()
	}
	return r.walks[key]
}

// keep keeps a walk for those that are like it. What was learnt since walkOf makes it void with the others.
func (r *receiving) keep(key senderOfWalk, walk *derivation) {
	if r != nil {
		r.walks[key] = walk
	}
}

// notedSigners are the devices and signatures that were noted in the transaction that is open. It is touched in the unit of work's transactions
// only.
type notedSigners struct {
	transaction dbutil.Execable
	claims      map[[sha256.Size]byte]struct{}
}

// noteSigners notes a device and who has signed it, once a transaction, and says whether any of it is news.
func (h *Hook) noteSigners(ctx context.Context, claim *SenderData) (news bool, err error) {
	transaction, digest := h.store.Execable(ctx), digestOfSigners(claim)
	if h.noted.transaction != transaction {
		h.noted = notedSigners{transaction: transaction, claims: make(map[[sha256.Size]byte]struct{})}
	}
	if _, noted := h.noted.claims[digest]; noted {
		return false, nil
	}
	if news, err = h.store.noteSigners(ctx, claim); err != nil {
		return news, fmt.Errorf("failed to note whose session %s is: %w", claim.SessionID, err)
	}
	h.noted.claims[digest] = struct{}{}
	return news, nil
}

// digestOfSigners is a hash of all that [store.noteSigners] notes of a claim. Each part has its length before it.
func digestOfSigners(claim *SenderData) [sha256.Size]byte {
	hash := sha256.New()
	add := func(part string) {
		_ = binary.Write(hash, binary.BigEndian, uint64(len(part)))
		hash.Write([]byte(part))
	}
	for _, part := range []string{claim.Sender.String(), claim.SenderKey.String(), claim.SigningKey.String()} {
		add(part)
	}
	for _, signer := range claim.signers {
		add(signer.key.String())
		add(string(signer.object))
	}
	return [sha256.Size]byte(hash.Sum(nil))
}

// forgetTransaction forgets what was done in the transaction that is open: a part of it was rolled back.
func (h *Hook) forgetTransaction() {
	h.noted, h.judgedPending = notedSigners{}, pendingJudged{}
}

package cryptohook

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"
)

// Of the keys that are stored in one transaction nearly all are as simple as can be: a session of which nothing is known, from a device that is.
// Such rows are put on a pile, and written by few statements instead of two for each key.
//
// What is written in any other way may look at them, so the pile is written before that: a transaction sees its rows as if each had been
// written at once.

// pile are rows that a transaction is yet to write. It goes with the transaction's context, in the [foresight]: one that foresees nothing has none.
type pile struct {
	groups []*crypto.InboundGroupSession
	claims []*SenderData
}

// stagedWrite is what the unit of work is to write.
type stagedWrite struct {
	write
	// pile, if there is one, puts the same on the pile of the transaction instead, or says no if that is not the same.
	pile func(ctx context.Context, p *pile) (piled bool, err error)
}

// putOnPile puts what is staged on the pile of the transaction, if there is one and if that can be done.
func (s stagedWrite) putOnPile(ctx context.Context) (piled bool, err error) {
	p := foresightOf(ctx).pile
	if p == nil || s.pile == nil {
		return false, nil
	}
	return s.pile(ctx, p)
}

// writePile writes what is on the pile of the transaction.
func (u *unitOfWork) writePile(ctx context.Context) error {
	p := foresightOf(ctx).pile
	if p == nil || len(p.groups)+len(p.claims) == 0 {
		return nil
	}
	groups, claims := p.groups, p.claims
	p.groups, p.claims = nil, nil
	if err := u.insertGroups(ctx, groups); err != nil {
		return fmt.Errorf("failed to store Megolm sessions: %w", err)
	}
	return u.upsertClaims(ctx, claims)
}

const upsertGroupQuery = `
	INSERT INTO crypto_megolm_inbound_session (
		session_id, sender_key, signing_key, room_id, session, forwarding_chains, shared_history, ratchet_safety, received_at, max_age,
		max_messages, is_scheduled, key_backup_version, key_source, source_user, account_id
	) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
	ON CONFLICT (session_id, account_id) DO UPDATE SET
		withheld_code=NULL, withheld_reason=NULL, sender_key=excluded.sender_key, signing_key=excluded.signing_key, room_id=excluded.room_id,
		session=excluded.session, forwarding_chains=excluded.forwarding_chains, shared_history=excluded.shared_history,
		ratchet_safety=excluded.ratchet_safety, received_at=excluded.received_at, max_age=excluded.max_age,
		max_messages=excluded.max_messages, is_scheduled=excluded.is_scheduled, key_backup_version=excluded.key_backup_version,
		key_source=excluded.key_source, source_user=excluded.source_user
`

var upsertGroups = dbutil.NewMassInsertBuilder[*groupRow, [0]any](
	upsertGroupQuery, "($%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d)")

// groupRow is a Megolm session as PutGroupSession of mautrix's store writes it.
type groupRow struct {
	*crypto.InboundGroupSession
	pickle, safety []byte
	err            error
	accountID      string
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (r *groupRow) GetMassInsertValues() [16]any {
	var receivedAt *time.Time
	if !r.ReceivedAt.IsZero() {
		receivedAt = &r.ReceivedAt
	}
	return [16]any{
		r.ID(), r.SenderKey, r.SigningKey, r.RoomID, r.pickle, strings.Join(r.ForwardingChains, ","), r.SharedHistory, r.safety, receivedAt,
		dbutil.NumPtr(r.MaxAge), dbutil.NumPtr(r.MaxMessages), r.IsScheduled, r.KeyBackupVersion, r.KeySource, r.SourceUser, r.accountID,
	}
}

// seal makes what of the row has to be worked out.
func (r *groupRow) seal(pickleKey []byte) {
	if r.pickle, r.err = r.Internal.Pickle(pickleKey); r.err == nil {
		r.safety, r.err = json.Marshal(&r.RatchetSafety)
	}
}

// insertGroups stores Megolm sessions as mautrix's store does each, the later one of two with one ID over the earlier one.
func (u *unitOfWork) insertGroups(ctx context.Context, sessions []*crypto.InboundGroupSession) error {
	rows := make([]*groupRow, len(sessions))
	sideBySide(len(rows), func(i int) {
		rows[i] = &groupRow{InboundGroupSession: sessions[i], accountID: u.AccountID}
		rows[i].seal(u.PickleKey)
	})
	for _, row := range rows {
		if row.err != nil {
			return row.err
		}
	}
	return insertAll(ctx, u.DB, upsertGroups, rows, func(r *groupRow) id.SessionID { return r.ID() })
}

package bot

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

const (
	insertVerificationQuery = `
		INSERT INTO bot_verification (transaction_id, user_id, device_id, room_id, in_room, opened_at_ms)
		VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (transaction_id) DO UPDATE SET device_id=excluded.device_id
	`
	endVerificationQuery   = `UPDATE bot_verification SET ended_at_ms=$2 WHERE transaction_id=$1`
	openVerificationsQuery = `
		SELECT transaction_id, user_id, device_id, room_id, in_room, opened_at_ms FROM bot_verification WHERE ended_at_ms IS NULL ORDER BY opened_at_ms
	`
	hadVerificationQuery     = `SELECT true FROM bot_verification WHERE transaction_id=$1`
	forgetVerificationsQuery = `DELETE FROM bot_verification WHERE ended_at_ms<$1`
)

func scanVerification(row dbutil.Scannable) (*dialogue, error) {
	d := newDialogue()
	var opened int64
	err := row.Scan(&d.txnID, &d.userID, &d.deviceID, &d.roomID, &d.inRoom, &opened)
	d.openedAt = time.UnixMilli(opened)
	return d, err
}

// putVerification notes that a verification is open, or with which device.
func (s *records) putVerification(ctx context.Context, d *dialogue) error {
	return s.exec(ctx, insertVerificationQuery, d.txnID, d.userID, d.deviceID, d.roomID, d.inRoom, d.openedAt.UnixMilli())
}

func (s *records) endVerification(ctx context.Context, txnID id.VerificationTransactionID, at time.Time) error {
	return s.exec(ctx, endVerificationQuery, txnID, at.UnixMilli())
}

// openVerifications gives those that were not ended. What was said in them is not known.
func (s *records) openVerifications(ctx context.Context) ([]*dialogue, error) {
	rows, err := s.Query(ctx, openVerificationsQuery)
	list, err := dbutil.NewRowIterWithError(rows, scanVerification, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the open verifications: %w", err)
	}
	return list, nil
}

// hadVerification says whether there is or was a verification with that transaction ID, in the last day.
func (s *records) hadVerification(ctx context.Context, txnID id.VerificationTransactionID) (had bool, err error) {
	err = s.QueryRow(ctx, hadVerificationQuery, txnID).Scan(&had)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return had, err
}

// forgetVerifications drops those that ended before that.
func (s *records) forgetVerifications(ctx context.Context, before time.Time) error {
	return s.exec(ctx, forgetVerificationsQuery, before.UnixMilli())
}

package cryptohook

import (
	"context"
	"fmt"

	"maunium.net/go/mautrix/id"
)

// FindKey looks the key of a session up in the account's key backup, at once, for somebody who wants to read an old message. It says whether
// the key is there now, in whatever way it came. What comes from the backup says nothing of who made it: messages on it are
// [CodeAuthenticityNotGuaranteed]. Events that wait for the key are looked at again.
//
// Without a backup that we have the key of, nothing is found. Errors are the network's or the database's; trying again may help.
func (h *Hook) FindKey(ctx context.Context, roomID id.RoomID, sessionID id.SessionID) (found bool, err error) {
	if !isKey(sessionID.String()) {
		return false, nil
	}
	logger := h.log.With().Str("action", "find key").Stringer("room_id", roomID).Stringer("session_id", sessionID).Logger()
	ctx = logger.WithContext(ctx)
	key := &missingKey{sessionID: sessionID, roomID: roomID}
	has, err := h.hasKey(ctx, key)
	if err != nil {
		return false, err
	}
	if has {
		session, err := h.existing(ctx, roomID, sessionID)
		if err != nil || session != nil && session.Internal.FirstKnownIndex() == 0 {
			return err == nil, err
		}
	}
	from, err := h.openBackup(ctx)
	if err != nil {
		return has, err
	}
	var result ImportResult
	_, err = h.fetchFromBackup(ctx, from, key, &result)
	h.keysCame(&result)
	if err != nil {
		return has, fmt.Errorf("failed to look the key up in the backup: %w", err)
	}
	return h.hasKey(ctx, key)
}

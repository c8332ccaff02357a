package cryptohook

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Keys that our own other devices send on: m.room_key_request, and m.forwarded_room_key in return.
// https://spec.matrix.org/v1.16/client-server-api/#key-requests

// Why a forwarded key is ignored. Nobody but us can make us take one.
var (
	errNotAskedFor      = fmt.Errorf("%w: nobody was asked for it", errBadExport)
	errAnsweredTooLate  = fmt.Errorf("%w: it was asked for too long ago", errBadExport)
	errNotFromOwnDevice = fmt.Errorf("%w: it was not sent by a device of this account that the account's identity vouches for", errBadExport)
)

// receiveForwarded stores the session of an m.forwarded_room_key within the unit of work, if it was asked for and comes from a device
// that was asked. Everything else is ignored. The error is one of the store's.
func (h *Hook) receiveForwarded(ctx context.Context, olmEvent *crypto.DecryptedOlmEvent) error {
	log := zerolog.Ctx(ctx)
	session, err := h.parseForwarded(ctx, olmEvent)
	var result ImportResult
	if err == nil {
		err = h.importSession(ctx, session, &result)
	}
	switch {
	case result.failure != nil:
		return result.failure
	case err != nil && !isExportFault(err):
		return err
	case err != nil:
		log.Warn().Err(err).Msg("Ignoring a forwarded room key")
		return nil
	}
	sessionID := session.ID()
	h.uow.stage(func(ctx context.Context) error {
		h.tellAfterCommit(Change{Sessions: []id.SessionID{sessionID}})
		return h.store.answerKeyRequest(ctx, sessionID)
	})
	log.Debug().Stringer("room_id", session.RoomID).Stringer("session_id", sessionID).Msg("Another device of ours has sent a key on")
	return nil
}

func (h *Hook) parseForwarded(ctx context.Context, olmEvent *crypto.DecryptedOlmEvent) (*crypto.InboundGroupSession, error) {
	vouched, err := h.isOwnDevice(ctx, olmEvent)
	if err != nil {
		return nil, err
	} else if !vouched {
		return nil, errNotFromOwnDevice
	}
	var content event.ForwardedRoomKeyEventContent
	if err = json.Unmarshal(olmEvent.Content.VeryRaw, &content); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadExport, err)
	}
	request, err := h.store.keyRequest(ctx, content.SessionID)
	switch {
	case err != nil:
		return nil, err
	case request == nil || request.requestID == "" || request.answered || request.roomID != content.RoomID:
		return nil, errNotAskedFor
	case h.clock().Sub(request.wantedAt) > keepRequests:
		return nil, errAnsweredTooLate
	}
	return parseExport(&crypto.ExportedSession{
		Algorithm: content.Algorithm, RoomID: content.RoomID, SessionID: content.SessionID, SessionKey: content.SessionKey,
		SenderKey: content.SenderKey, SenderClaimedKeys: crypto.SenderClaimedKeys{Ed25519: content.SenderClaimedKey},
		SharedHistory: content.SharedHistory,
	}, id.KeySourceForward, olmEvent.Sender)
}

// isOwnDevice says whether an Olm message is from another device of our account, one that is there now, and that our own self-signing key
// has signed.
func (h *Hook) isOwnDevice(ctx context.Context, olmEvent *crypto.DecryptedOlmEvent) (bool, error) {
	if olmEvent.Sender != h.client.UserID {
		return false, nil
	}
	raw, err := h.store.deviceByKey(ctx, olmEvent.Sender, olmEvent.SenderKey, olmEvent.Keys.Ed25519)
	if err != nil || raw == nil {
		return false, err
	}
	d := derivation{data: SenderData{Sender: olmEvent.Sender, SenderKey: olmEvent.SenderKey, SigningKey: olmEvent.Keys.Ed25519}}
	return d.useDevice(raw) && d.ownsSession() && d.keys.DeviceID != h.client.DeviceID &&
		signedBy(raw, h.client.UserID, h.anchor().selfSigningKey), nil
}

const getOwnDevicesQuery = `SELECT device_keys FROM sendertrust_device WHERE user_id=$1 AND device_id<>$2 AND deleted=false`

// othersMayAnswer says whether our account has another device whose answer would be accepted.
func (h *Hook) othersMayAnswer(ctx context.Context) (bool, error) {
	rows, err := h.store.Query(ctx, getOwnDevicesQuery, h.client.UserID, h.client.DeviceID)
	devices, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).AsList()
	if err != nil {
		return false, fmt.Errorf("failed to read our own devices: %w", err)
	}
	for _, keys := range devices {
		if signedBy(json.RawMessage(keys), h.client.UserID, h.anchor().selfSigningKey) {
			return true, nil
		}
	}
	return false, nil
}

// sendDue sends the requests and cancellations that are due, a few. What fails is sent again, under the same ID.
func (s *keySearch) sendDue(ctx context.Context) (sent int, err error) {
	h := s.hook
	due, err := h.store.dueRequests(ctx, searchesAtOnce)
	if err != nil {
		return 0, err
	}
	for _, request := range due {
		if err = h.sendKeyRequest(ctx, request); err != nil {
			return sent, fmt.Errorf("failed to ask our other devices: %w", err)
		}
		now := h.clock()
		err = h.store.write(ctx, func(ctx context.Context) error {
			if request.answered {
				return h.store.deleteKeyRequest(ctx, request.sessionID)
			}
			return h.store.sentKeyRequest(ctx, request.sessionID, now)
		})
		if err != nil {
			return sent, err
		}
		if request.answered {
			s.mu.Lock()
			delete(s.open, request.sessionID)
			s.mu.Unlock()
		}
		sent++
	}
	return sent, nil
}

// sendKeyRequest asks every other device of our account: which of them may answer is decided when an answer comes.
//
// mautrix's own SendRoomKeyRequest puts an empty sender_key into the request if it is not known, which matrix-sdk-crypto cannot read.
func (h *Hook) sendKeyRequest(ctx context.Context, request *keyRequest) error {
	content := map[string]any{
		"action": event.KeyRequestActionRequest, "request_id": request.requestID, "requesting_device_id": h.client.DeviceID,
	}
	if request.answered {
		content["action"] = event.KeyRequestActionCancel
	} else {
		content["body"] = map[string]any{
			"algorithm": id.AlgorithmMegolmV1, "room_id": request.roomID, "session_id": request.sessionID,
		}
	}
	zerolog.Ctx(ctx).Debug().Stringer("session_id", request.sessionID).Any("action", content["action"]).Msg("Asking our other devices for a key")
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err := h.client.SendToDevice(ctx, event.ToDeviceRoomKeyRequest, &mautrix.ReqSendToDevice{
		Messages: map[id.UserID]map[id.DeviceID]*event.Content{h.client.UserID: {"*": {Raw: content}}},
	})
	return err
}

// requestTimeout is for one request of the key search, with mautrix's own retries.
const requestTimeout = 30 * time.Second

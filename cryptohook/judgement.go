package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// longestIdentityWait is how long a verdict waits for a key query about the sender. After that it is given from what is known.
const longestIdentityWait = 5 * time.Second

// judge gives the event for the handler, decrypted if it can and may be, with its verdict; or how long to wait at most.
func (h *Hook) judge(ctx context.Context, e *inboxEvent, evt *event.Event) (_ *event.Event, v Verdict, wait time.Duration, err error) {
	e.awaitsKey = false
	switch {
	case evt.Type != event.EventEncrypted && e.roomEncrypted:
		v.Code = CodeSentInClear
	case evt.Type != event.EventEncrypted:
		v.Code = CodeNotEncrypted
	case evt.Content.Parsed == nil:
		v.Code, v.Reason = CodeUnableToDecrypt, ReasonMalformed
	default:
		return h.judgeEncrypted(ctx, e, evt)
	}
	v.EventID = e.eventID
	if !h.options.Requirement.allows(v) && v.Code == CodeSentInClear {
		v.ContentWithheld = true
		withhold(evt)
	}
	return evt, v, 0, nil
}

// withhold leaves of a plaintext event what its handlers need to answer it, and nothing that somebody may have made up to be obeyed.
func withhold(evt *event.Event) {
	kept := make(map[string]any)
	for _, key := range []string{"msgtype", "m.relates_to"} {
		if value, ok := evt.Content.Raw[key]; ok {
			kept[key] = value
		}
	}
	evt.Content = event.Content{Raw: kept}
	if raw, err := json.Marshal(kept); err == nil {
		evt.Content.VeryRaw = raw
	}
	if evt.Content.ParseRaw(evt.Type) != nil {
		evt.Content.Parsed = nil
	}
}

// judgeEncrypted judges by the claims on the event's session, once what its sender publishes is known or took too long.
func (h *Hook) judgeEncrypted(ctx context.Context, e *inboxEvent, evt *event.Event) (_ *event.Event, v Verdict, wait time.Duration, err error) {
	sessionID := evt.Content.AsEncrypted().SessionID
	grounds, awaits, err := h.groundsNow(ctx, sessionID)
	if err != nil {
		return nil, v, 0, err
	}
	if left := h.identityWait(e, grounds); awaits && left > 0 {
		return nil, v, left, nil
	}
	if v, err = h.weigh(ctx, evt.Sender, sessionID, grounds); err != nil {
		return nil, v, 0, err
	}
	v.EventID, v.Outdated = e.eventID, awaits
	switch v.Code {
	case CodeSessionRejected, CodeMismatchedSender:
		// What somebody else sends on is not decrypted: it must not use up the message index of the original.
		v.ContentWithheld = true
		return evt, v, 0, nil
	case CodeSessionConflict:
		ctx = withDisputed(ctx)
	}
	decrypted, err := h.decrypt(ctx, evt)
	if err != nil {
		if len(grounds) == 0 {
			// There is no session, so there is nothing about its sender either.
			v.State, v.Legacy = "", false
		}
		wait, err = h.judgeUndecrypted(ctx, e, evt.Sender, &v, err)
		return evt, v, wait, err
	}
	if len(grounds) == 0 {
		// The key has come since the claims were looked up, and may be staged only: what is known of its sender comes with it.
		if err = h.uow.flush(ctx); err != nil {
			return nil, v, 0, err
		}
		if grounds, err = h.store.grounds(ctx, sessionID); err != nil {
			return nil, v, 0, err
		} else if len(grounds) > 0 {
			return h.judgeEncrypted(ctx, e, evt)
		}
	}
	if !h.options.Requirement.allows(v) {
		v.ContentWithheld = true
		return evt, v, 0, nil
	}
	decrypted.Mautrix.EventSource |= event.SourceDecrypted
	return decrypted, v, 0, relateAsSent(decrypted, evt)
}

// weigh gives the verdict on a message of sender by the living claims on its session, and by what is known of their senders.
func (h *Hook) weigh(ctx context.Context, sender id.UserID, sessionID id.SessionID, grounds []ground) (Verdict, error) {
	var identity *Identity
	if len(grounds) > 0 {
		identity = grounds[0].identity
	}
	v := h.anchor().verdict(sender, sessionID, claimsOf(grounds), identity)
	return v, h.nameSource(ctx, &v)
}

// judgeUndecrypted puts into the verdict why the event cannot be decrypted, or says how long its key may take.
func (h *Hook) judgeUndecrypted(ctx context.Context, e *inboxEvent, sender id.UserID, v *Verdict, failure error) (wait time.Duration, err error) {
	code, reason, final, err := h.whyUndecrypted(ctx, e.roomID, sender, v.SessionID, failure)
	if err != nil {
		return 0, err
	}
	if left := h.options.KeyWait - h.clock().Sub(e.receivedAt); !final && left > 0 {
		if code == CodeUnableToDecrypt {
			h.search.want(e.roomID, sender, v.SessionID, reason == ReasonUnknownIndex)
		}
		if h.inbox.mayWait(e) {
			e.awaitsKey = true
			return left, nil
		}
		h.counters.reach(LimitWaiting)
		zerolog.Ctx(ctx).Info().Msg("Not waiting for the key of an event: as many of its sender or its room wait as may")
	}
	zerolog.Ctx(ctx).Debug().Err(failure).Msg("Failed to decrypt an event")
	v.Code, v.Reason = code, reason
	return 0, nil
}

// whyUndecrypted says what a failed decryption means: see classify. The error is the store's.
func (h *Hook) whyUndecrypted(ctx context.Context, roomID id.RoomID, sender id.UserID, sessionID id.SessionID, failure error) (
	code Code, reason string, final bool, err error,
) {
	code, reason, final, known := classify(failure)
	if !known {
		return "", "", false, failure
	}
	if reason != ReasonUnknownSession {
		return code, reason, final, nil
	}
	withheld, err := h.store.withheld(ctx, sessionID, sender)
	if err != nil {
		return "", "", false, err
	}
	if withheld != "" {
		reason, final = string(withheld), finalWithheld[withheld]
	}
	holder, err := h.store.holder(ctx, h.uow.AccountID, sessionID)
	if err != nil {
		return "", "", false, err
	}
	if holder != nil && holder.roomID != roomID {
		// Sessions never change their room.
		reason, final = ReasonWrongRoom, true
	}
	return code, reason, final, nil
}

var errUnbearable = errors.New("mautrix cannot bear the payload")

// decrypt shields us from mautrix 0.31, which panics at a Megolm payload that is the JSON null: a member could end the process
// with one message, again and again.
func (h *Hook) decrypt(ctx context.Context, evt *event.Event) (decrypted *event.Event, err error) {
	defer func() {
		if reason := recover(); reason != nil {
			err = fmt.Errorf("%w: %v", errUnbearable, reason)
		}
	}()
	return h.mach.DecryptMegolmEvent(withDecrypting(ctx), evt)
}

// identityWait is how much longer what the sender publishes may take: it counts from when the event and its key were both there.
// Whoever claims the session again and again does not hold its messages up.
func (h *Hook) identityWait(e *inboxEvent, grounds []ground) time.Duration {
	now, complete := h.clock(), e.receivedAt
	for _, claim := range grounds {
		if claim.ReceivedAt.After(complete) {
			complete = claim.ReceivedAt
		}
	}
	return min(longestIdentityWait-now.Sub(complete), h.options.KeyWait+longestIdentityWait-now.Sub(e.receivedAt))
}

// awaitsKeys says that the sender's keys are being asked for, are to be, or were and nobody answered, so that the verdict may change
// at once. That a list is out of date is looked up and not only remembered: the inbox may see a message as soon as it is durable, and
// then what is durable with it counts.
func (h *Hook) awaitsKeys(grounds []ground) bool {
	for _, claim := range grounds {
		if claim.awaitsFirstLook() || h.resolver.pending(claim.Sender) {
			return true
		}
		if claim.Sender == "" {
			continue
		}
		// What is proven stands without a list; what is not may be for want of one.
		if claim.outdated || !claim.tracked && !claim.State.proven() {
			return true
		}
	}
	return false
}

// finalWithheld are the codes by which a sender says that the key will not come.
// https://spec.matrix.org/v1.16/client-server-api/#mroom_keywithheld
var finalWithheld = map[event.RoomKeyWithheldCode]bool{
	event.RoomKeyWithheldBlacklisted:  true,
	event.RoomKeyWithheldUnverified:   true,
	event.RoomKeyWithheldUnauthorized: true,
}

// classify says what a failed decryption means: a code and its reason, and whether a key that comes later cannot change it.
// Errors that it does not know are the store's.
func classify(err error) (code Code, reason string, final, known bool) {
	switch {
	case errors.Is(err, crypto.ErrNoSessionFound):
		return CodeUnableToDecrypt, ReasonUnknownSession, false, true
	case errors.Is(err, crypto.ErrGroupSessionWithheld):
		// mautrix has redacted the key, for example since it expired.
		return CodeUnableToDecrypt, ReasonKeyDeleted, true, true
	case errors.Is(err, crypto.ErrDuplicateMessageIndex):
		return CodeMismatchedSender, ReasonReplayed, true, true
	case errors.Is(err, olm.ErrUnknownMessageIndex):
		return CodeUnableToDecrypt, ReasonUnknownIndex, false, true
	case errors.Is(err, crypto.ErrWrongRoom):
		return CodeUnableToDecrypt, ReasonWrongRoom, true, true
	case errors.Is(err, crypto.ErrUnsupportedAlgorithm):
		return CodeUnableToDecrypt, ReasonUnsupportedAlgorithm, true, true
	case errors.Is(err, errStorage):
		return "", "", false, false
	default:
		return CodeUnableToDecrypt, ReasonMalformed, true, true
	}
}

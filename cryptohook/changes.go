package cryptohook

import (
	"context"

	"maunium.net/go/mautrix/id"
)

// How verdicts that were given stay true: whoever has told somebody a verdict is told when it may no longer hold, and asks again.

// Change names what may have changed the verdicts of messages: all those of the users, and all those in the sessions.
type Change struct {
	Users    []id.UserID
	Sessions []id.SessionID
}

// changed tells the owner of the hook what has changed. It is called after the commit: what is lost by a crash in between, the
// owner finds by reviewing what it has told when it starts.
func (h *Hook) changed(change Change) {
	if h.options.OnChange != nil && len(change.Users)+len(change.Sessions) > 0 {
		h.options.OnChange(change)
	}
}

// tellAfterCommit has a change told once the unit of work is durable that it is part of.
func (h *Hook) tellAfterCommit(change Change) {
	h.changesLock.Lock()
	defer h.changesLock.Unlock()
	h.changes.Users = append(h.changes.Users, change.Users...)
	h.changes.Sessions = append(h.changes.Sessions, change.Sessions...)
}

// tellCommitted tells what has changed in the units of work that are durable now.
func (h *Hook) tellCommitted() {
	h.changesLock.Lock()
	change := h.changes
	h.changes = Change{}
	h.changesLock.Unlock()
	h.changed(change)
}

// Review gives the verdict that a message would get now, by the verdict that it got and the sender of its event. What does not
// depend on the sender's keys stays as it was: plaintext stays plaintext, a repetition stays one. A message that could not be
// decrypted comes to its handlers again once its key has come, so it stays as it was, too.
func (h *Hook) Review(ctx context.Context, told Verdict, sender id.UserID) (Verdict, error) {
	switch told.Code {
	case CodeSentInClear, CodeNotEncrypted, CodeUnableToDecrypt:
		return told, nil
	case CodeMismatchedSender:
		if told.Reason == ReasonReplayed {
			return told, nil
		}
	}
	grounds, awaits, err := h.groundsNow(ctx, told.SessionID)
	if err != nil {
		return told, err
	}
	now, err := h.weigh(ctx, sender, told.SessionID, grounds)
	if err != nil {
		return told, err
	}
	now.EventID, now.ContentWithheld = told.EventID, told.ContentWithheld
	// A list that was up to date when the verdict was given does not make it doubtful later.
	now.Outdated = told.Outdated && awaits
	return now, nil
}

package cryptohook

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// Sessions that did not come from the device that made them: exported by somebody who has them, and imported here. Whoever exports a
// session can write any sender into it, and an export is not signed. So such a session says nothing about who made it: it is legacy and
// of an unknown device until its owner's own m.room_key comes. See merge.yaml in testdata for what becomes of two that meet.

// keySourceBundle is what mautrix's table says of sessions from a bundle; mautrix itself has no word for them.
const keySourceBundle = id.KeySource(SourceHistoryBundle)

// Faults of exported sessions. They are logged once each; the session is skipped.
var (
	errBadExport     = errors.New("the exported session is not valid")
	errClaimsNoOwner = fmt.Errorf("%w: it does not say which device made it", errBadExport)
	errNoRoom        = fmt.Errorf("%w: it is of no room", errBadExport)
	errOtherRoom     = fmt.Errorf("%w: it is of another room", errBadExport)
	errForgedRatchet = fmt.Errorf("%w: it has another ratchet than the one that is stored under its ID", errBadExport)
)

// isExportFault says that a session is refused for what is in it: trying again is no use.
func isExportFault(err error) bool { return errors.Is(err, errBadExport) }

// ImportResult counts what became of the sessions of an import.
type ImportResult struct {
	// Total is the number of sessions that were offered.
	Total int
	// Imported are those that bring what was not known: a new session, or earlier messages of a known one.
	Imported int
	// Known are those that bring nothing new.
	Known int
	// Conflicting are those that say that another device made a session than what is known says: see [CodeSessionConflict].
	Conflicting int
	// Refused are those that are not valid. The log says why.
	Refused int

	sessions []id.SessionID
	// failure is the store's last error.
	failure error
}

type importKey struct{}

// withImport marks the context in which sessions are imported. For it mautrix finds no session stored, so that it hands over what came as
// it came, instead of merging it by rules of its own: storeOther merges.
func withImport(ctx context.Context, result *ImportResult) context.Context {
	return context.WithValue(ctx, importKey{}, result)
}

func importOf(ctx context.Context) *ImportResult {
	result, _ := ctx.Value(importKey{}).(*ImportResult)
	return result
}

// imported, known and conflicting count a session whose storing ended with err, which they return.
func (r *ImportResult) imported(sessionID id.SessionID, err error) error {
	if r != nil && err == nil {
		r.Imported++
		r.sessions = append(r.sessions, sessionID)
	}
	return err
}

func (r *ImportResult) known(err error) error {
	if r != nil && err == nil {
		r.Known++
	}
	return err
}

func (r *ImportResult) conflicting(sessionID id.SessionID, err error) error {
	if r != nil && err == nil {
		r.Conflicting++
		r.sessions = append(r.sessions, sessionID)
	}
	return err
}

func (r *ImportResult) fail(err error) {
	if r != nil && !isExportFault(err) {
		r.failure = err
	}
}

// parseExport makes the Megolm session of one that was exported by sourceUser.
func parseExport(exported *crypto.ExportedSession, source id.KeySource, sourceUser id.UserID) (*crypto.InboundGroupSession, error) {
	if exported.Algorithm != id.AlgorithmMegolmV1 {
		return nil, fmt.Errorf("%w: %w", errBadExport, errNotMegolm)
	}
	internal, err := olm.InboundGroupSessionImport([]byte(exported.SessionKey))
	if err != nil {
		return nil, fmt.Errorf("%w: failed to read the session key: %w", errBadExport, err)
	}
	if internal.ID() != exported.SessionID {
		return nil, fmt.Errorf("%w: %w", errBadExport, errSessionIDMismatch)
	}
	session := &crypto.InboundGroupSession{
		Internal: internal, SigningKey: exported.SenderClaimedKeys.Ed25519, SenderKey: exported.SenderKey, RoomID: exported.RoomID,
		ForwardingChains: []string{}, SharedHistory: exported.SharedHistory, ReceivedAt: time.Now().UTC(),
		KeySource: source, SourceUser: sourceUser,
	}
	return session, checkExport(session)
}

// checkExport refuses a session that could be nobody's. What is no key as keys are written fits into no table.
func checkExport(session *crypto.InboundGroupSession) error {
	switch {
	case !isKey(session.SenderKey.String()) || !isKey(session.SigningKey.String()):
		return errClaimsNoOwner
	case session.RoomID == "":
		return errNoRoom
	}
	return nil
}

// importSession stores a session by the rules for those that did not come in an m.room_key.
func (h *Hook) importSession(ctx context.Context, session *crypto.InboundGroupSession, result *ImportResult) error {
	result.Total++
	err := h.mach.StoreGroupSession(withImport(ctx, result), session)
	if isExportFault(err) {
		result.Refused++
	}
	return err
}

// keysCame has everybody look again who may have waited for what was imported. It is called after the commit.
func (h *Hook) keysCame(result *ImportResult) {
	if len(result.sessions) > 0 {
		h.inbox.signal()
		h.changed(Change{Sessions: result.sessions})
	}
}

// Errors of [Hook.ImportKeys].
var (
	// ErrNotAKeyExport: the file is no key export, or it is damaged.
	ErrNotAKeyExport = errors.New("the file is not a Matrix key export")
	// ErrExportTooDear: opening the file would take too long, or too much memory. No app writes such files.
	ErrExportTooDear = errors.New("the key export is made to be too expensive to open")
	// ErrPassphrase: the passphrase is not the one of the file.
	ErrPassphrase = errors.New("the passphrase does not open the key export")
)

const (
	// maxExport is in bytes; a session takes about 700.
	maxExport = 256 << 20
	// maxExportRounds takes some seconds. Apps use 100,000 to 500,000.
	maxExportRounds = 10_000_000

	exportPrefix, exportSuffix = "-----BEGIN MEGOLM SESSION DATA-----\n", "-----END MEGOLM SESSION DATA-----\n"
	// exportRoundsAt is after the version, the salt and the initialisation vector; a hash of 32 bytes ends the file.
	exportRoundsAt, exportLeast = 1 + 16 + 16, 1 + 16 + 16 + 4 + 32
)

// ImportKeys imports the sessions of a key export, as apps write it.
// https://spec.matrix.org/v1.16/client-server-api/#key-exports
//
// Nothing in such a file proves who made a session: their messages are [CodeAuthenticityNotGuaranteed] until the sessions come from
// their owners. Events that wait for one of them are looked at again.
func (h *Hook) ImportKeys(ctx context.Context, passphrase string, file []byte) (result ImportResult, err error) {
	if file, err = checkExportFile(file); err != nil {
		return result, err
	}
	ctx = h.log.With().Str("action", "import keys").Logger().WithContext(ctx)
	_, total, err := h.importFile(withImport(ctx, &result), passphrase, file)
	result.Total = max(total, result.Imported+result.Known+result.Conflicting)
	result.Refused = result.Total - result.Imported - result.Known - result.Conflicting
	h.keysCame(&result)
	switch {
	case result.failure != nil:
		return result, result.failure
	case errors.Is(err, crypto.ErrMismatchingExportHash):
		return result, ErrPassphrase
	case err != nil && ctx.Err() == nil:
		return result, fmt.Errorf("%w: %w", ErrNotAKeyExport, err)
	}
	return result, err
}

// importFile shields us from mautrix 0.31, which panics at a session that is the JSON null.
func (h *Hook) importFile(ctx context.Context, passphrase string, file []byte) (imported, total int, err error) {
	defer func() {
		if reason := recover(); reason != nil {
			err = fmt.Errorf("%w: %v", errUnbearable, reason)
		}
	}()
	return h.mach.ImportKeys(ctx, passphrase, file)
}

// checkExportFile refuses what mautrix would not survive, or work on for days: it trusts the header. It gives the file with the ends of
// lines that mautrix expects.
func checkExportFile(file []byte) ([]byte, error) {
	if len(file) > maxExport {
		return nil, fmt.Errorf("%w: it has %d bytes", ErrExportTooDear, len(file))
	}
	file = append(bytes.TrimSpace(bytes.ReplaceAll(file, []byte("\r\n"), []byte("\n"))), '\n')
	body, begins := bytes.CutPrefix(file, []byte(exportPrefix))
	body, ends := bytes.CutSuffix(body, []byte(exportSuffix))
	if !begins || !ends {
		return nil, fmt.Errorf("%w: its first or its last line is not the one of an export", ErrNotAKeyExport)
	}
	data := make([]byte, base64.StdEncoding.DecodedLen(len(body)))
	n, err := base64.StdEncoding.Decode(data, body)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrNotAKeyExport, err)
	case n < exportLeast:
		return nil, fmt.Errorf("%w: it is cut off", ErrNotAKeyExport)
	}
	if rounds := binary.BigEndian.Uint32(data[exportRoundsAt:]); rounds == 0 || rounds > maxExportRounds {
		return nil, fmt.Errorf("%w: it asks for %d rounds of its key derivation", ErrExportTooDear, rounds)
	}
	return file, nil
}

// ratchetOrder says how the ratchet of a session that arrives relates to that of the stored session with the same ID.
type ratchetOrder int

const (
	ratchetUnconnected ratchetOrder = iota
	ratchetWorse                    // it opens later messages only
	ratchetEqual
	ratchetBetter // it opens earlier messages, too
)

// compareRatchets compares two sessions of one ID. Both are moved on by it, not back.
func compareRatchets(stored, arrived *crypto.InboundGroupSession) ratchetOrder {
	first, own := stored.Internal.FirstKnownIndex(), arrived.Internal.FirstKnownIndex()
	switch {
	case !connected(stored, arrived):
		return ratchetUnconnected
	case own < first:
		return ratchetBetter
	case own == first:
		return ratchetEqual
	default:
		return ratchetWorse
	}
}

// storeOther stores a session that did not come in an m.room_key: an export, or one of our own. What is stored keeps its place and
// its claim; a better ratchet of the same session is merged in. It fails with [errBadExport] for what it refuses.
func (h *Hook) storeOther(ctx context.Context, session *crypto.InboundGroupSession) error {
	result := importOf(ctx)
	err := h.mergeExport(withoutImport(ctx), session, result)
	switch {
	case err != nil:
		result.fail(err)
	case result == nil && !isReceiving(ctx) && !h.uow.isOwn(session):
		// mautrix imports it for somebody who does not tell us when it is done.
		h.keysCame(&ImportResult{sessions: []id.SessionID{session.ID()}})
	}
	return err
}

func (h *Hook) mergeExport(ctx context.Context, session *crypto.InboundGroupSession, result *ImportResult) error {
	sessionID := session.ID()
	if err := checkExport(session); err != nil {
		return err
	}
	current, err := h.holderOf(ctx, sessionID)
	if err != nil {
		return err
	}
	held := current != nil && *current == holder{session.RoomID, session.SenderKey, session.SigningKey}
	if session.KeySource == id.KeySourceDirect && !held && !h.uow.isOwn(session) {
		return fmt.Errorf("%w: session %s of %s", ErrHookBypassed, sessionID, session.SenderKey)
	}
	claim := h.otherClaim(session)
	merge := func(ctx context.Context) error { return h.mergeClaim(ctx, claim) }
	var existing *crypto.InboundGroupSession
	if current != nil {
		if existing, err = h.existing(ctx, current.roomID, sessionID); err != nil {
			return err
		}
	}
	if existing == nil {
		return result.imported(sessionID, h.uow.putGroupSession(ctx, session, merge))
	}
	order := compareRatchets(existing, session)
	switch {
	case order == ratchetUnconnected && (held || existing.KeySource == id.KeySourceDirect):
		// Not even the claim counts: an m.room_key is signed with the session's own key, and this is not that session.
		return errForgedRatchet
	case held && order != ratchetBetter:
		return result.known(h.uow.writeBehind(ctx, sessionID, merge))
	case held && session.KeySource == id.KeySourceDirect:
		// mautrix has merged a better ratchet into a session that came directly.
		return h.uow.putGroupSession(ctx, session, nil)
	case held:
		return result.imported(sessionID, h.uow.putGroupSession(ctx, asStored(existing, session), merge))
	case current.senderKey == session.SenderKey:
		return fmt.Errorf("%w: %w", errBadExport, errUnconnected)
	}
	h.log.Error().Stringer("session_id", sessionID).Stringer("sender_key", session.SenderKey).Stringer("other_sender_key", current.senderKey).
		Msg("An exported session claims the ID of one that another device brought: keeping the first one's, and both claims")
	both := func(ctx context.Context) error {
		if err := h.store.claimForHolder(ctx, sessionID, current); err != nil {
			return err
		}
		return merge(ctx)
	}
	if order != ratchetBetter {
		return result.conflicting(sessionID, h.uow.writeBehind(ctx, sessionID, both))
	}
	return result.conflicting(sessionID, h.uow.putGroupSession(ctx, asStored(existing, session), both))
}

// asStored gives the session that arrives, with its better ratchet, as the one that is stored: how that came says more about it.
func asStored(existing, arrived *crypto.InboundGroupSession) *crypto.InboundGroupSession {
	merged := *existing
	merged.Internal, merged.KeyBackupVersion = arrived.Internal, arrived.KeyBackupVersion
	return &merged
}

func withoutImport(ctx context.Context) context.Context {
	if importOf(ctx) == nil {
		return ctx
	}
	return context.WithValue(ctx, importKey{}, nil)
}

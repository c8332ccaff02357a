package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/crypto/ssss"
	"maunium.net/go/mautrix/id"
)

// backupKeeper puts every session that is stored into the account's key backup, beside everything else, a batch at a time. It reads the
// database only, so that what is in the backup is durable here, and notes with each session which version has it. Nothing is lost by a
// crash: what is not noted is put there again, and the server keeps the better of two.
//
// The fields without a lock belong to [Hook.KeepBackup], and then to run.
type backupKeeper struct {
	hook *Hook
	wake chan struct{}

	// wanted says that somebody wants the backup kept; storage is the opened secret storage until the backup is found or made.
	wanted  bool
	storage *ssss.Key
	// made says that this process has made a version.
	made bool
	// backup is the version that sessions are put into; nil while there is none that is ours.
	backup *keyBackup
	// next is when there may be something to do again, after so many failures in a row.
	next     time.Time
	failures int
	// size is how many sessions the next batch has at most.
	size int
	// said is why there is no backup, as it was last logged.
	said string

	// waiting and uploadedAt (milliseconds) are for [Stats].
	waiting, uploadedAt atomic.Int64
}

const (
	// uploadDelay gives other sessions the time to come along, and what their senders publish to be asked for.
	uploadDelay = 5 * time.Second
	// uploadPause is between two batches of which the first did not take all.
	uploadPause    = time.Second
	sessionsAtOnce = 100
	lookForAnother = time.Hour
	longestRoomID  = 255
)

var (
	errBackupGone    = errors.New("the version of the key backup is not the newest any more")
	errKeysNotKept   = errors.New("the homeserver has not kept all keys that were put into the backup")
	errUnusualRoomID = errors.New("it is of a room that no homeserver has")
)

func newBackupKeeper(hook *Hook) *backupKeeper {
	return &backupKeeper{hook: hook, wake: make(chan struct{}, 1), size: sessionsAtOnce}
}

// run works until the context ends.
func (k *backupKeeper) run(ctx context.Context) {
	for k.wanted && ctx.Err() == nil {
		sleep := k.pass(ctx)
		timer := time.NewTimer(sleep)
		select {
		case <-ctx.Done():
		case <-k.wake:
			k.delay()
		case <-timer.C:
		}
		timer.Stop()
	}
}

// delay has the next batch wait for what comes along with the session that has just come, but not for ever.
func (k *backupKeeper) delay() {
	if now := k.hook.clock(); !now.Before(k.next) {
		k.next = now.Add(uploadDelay)
	}
}

// pass does what is due, and gives how long there is nothing more to do, unless a session comes.
func (k *backupKeeper) pass(ctx context.Context) time.Duration {
	now := k.hook.clock()
	if now.Before(k.next) {
		return min(k.next.Sub(now), longestSleep)
	}
	ctx = k.hook.log.With().Str("component", "key backup").Logger().WithContext(ctx)
	more, err := k.work(ctx)
	pause := longestSleep
	switch {
	case ctx.Err() != nil:
		return 0
	case isForSomebodyElse(err):
		k.failures, pause = 0, lookForAnother
		k.waiting.Store(0)
	case err != nil:
		pause = min(firstBackoff<<min(k.failures, maxRetries), maxBackoff)
		k.failures++
		zerolog.Ctx(ctx).Warn().Err(err).Dur("retry_in", pause).Msg("Failed to put keys into the backup, trying again")
	case more:
		k.failures, pause = 0, uploadPause
	default:
		k.failures = 0
		return pause
	}
	k.next = now.Add(pause)
	return min(pause, longestSleep)
}

// isForSomebodyElse says that there is no backup of ours, and that trying again is no use.
func isForSomebodyElse(err error) bool {
	return errors.Is(err, ErrOthersBackup) || errors.Is(err, ErrStorageKeyNeeded)
}

// work looks for the backup if it is not known, and puts a batch of sessions into it. It says whether there may be more.
func (k *backupKeeper) work(ctx context.Context) (more bool, err error) {
	if k.backup == nil {
		if err = k.look(ctx); err != nil {
			return false, err
		}
	}
	h, version := k.hook, k.backup.version
	// They are counted once for many batches: that takes as long as there are many.
	if k.waiting.Load() <= 0 {
		waiting, err := h.store.countToBackUp(ctx, h.uow.AccountID, version)
		k.waiting.Store(int64(waiting))
		if err != nil || waiting == 0 {
			return false, err
		}
	}
	sessions, err := h.store.toBackUp(ctx, h.uow.AccountID, version, k.size)
	if err == nil && len(sessions) == 0 {
		k.waiting.Store(0)
	}
	if err != nil || len(sessions) == 0 {
		return false, err
	}
	if err = k.upload(ctx, sessions); err != nil {
		return false, err
	}
	k.waiting.Store(max(0, k.waiting.Load()-int64(len(sessions))))
	return true, nil
}

// look finds the backup, or makes it. Why there is none is told once.
func (k *backupKeeper) look(ctx context.Context) (err error) {
	k.backup, err = k.settle(ctx)
	switch {
	case err == nil:
		k.storage, k.said = nil, ""
		zerolog.Ctx(ctx).Info().Stringer("version", k.backup.version).Msg("Keeping the account's key backup")
	case isForSomebodyElse(err) && k.said != err.Error():
		k.said = err.Error()
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Keys are not backed up")
	}
	return err
}

// upload puts sessions into the backup, and notes it. A batch that the server does not take is tried again in parts, so that what it
// refuses keeps nothing else back.
func (k *backupKeeper) upload(ctx context.Context, sessions []*waitingSession) error {
	log := zerolog.Ctx(ctx)
	batch := make(map[id.RoomID]mautrix.ReqRoomKeyBackup)
	count := 0
	for _, session := range sessions {
		if !mayBeRoomID(session.roomID) {
			log.Warn().Err(errUnusualRoomID).Stringer("session_id", session.sessionID).Msg("Not backing a session up")
			continue
		}
		data, err := k.encrypt(session)
		if err != nil {
			return err
		}
		room, known := batch[session.roomID]
		if !known {
			room.Sessions = make(map[id.SessionID]mautrix.ReqKeyBackupData)
			batch[session.roomID] = room
		}
		room.Sessions[session.sessionID] = *data
		count++
	}
	err := k.put(ctx, batch, count)
	switch {
	case err == nil:
		k.size = min(2*k.size, sessionsAtOnce)
	case isRefusedUpload(err) && count == 1 && len(sessions) == 1:
		log.Warn().Err(err).Stringer("session_id", sessions[0].sessionID).Msg("The homeserver refuses to back a session up; going on without it")
	default:
		return err
	}
	return k.note(ctx, sessions)
}

// put sends a batch.
func (k *backupKeeper) put(ctx context.Context, batch map[id.RoomID]mautrix.ReqRoomKeyBackup, count int) error {
	if count == 0 {
		return nil
	}
	request, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := k.hook.client.PutKeysInBackup(request, k.backup.version, &mautrix.ReqKeyBackup{Rooms: batch})
	var httpError mautrix.HTTPError
	switch {
	case errors.Is(err, mautrix.MWrongRoomKeysVersion), errors.Is(err, mautrix.MNotFound):
		k.backup = nil
		return fmt.Errorf("%w: %w", errBackupGone, err)
	case errors.As(err, &httpError) && httpError.Response != nil && httpError.Response.StatusCode >= http.StatusBadRequest:
		k.size = max(count/2, 1)
		return fmt.Errorf("failed to put %d sessions into the backup: %w", count, err)
	case err != nil:
		return fmt.Errorf("failed to put %d sessions into the backup: %w", count, err)
	case answer == nil || answer.Count < count:
		return errKeysNotKept
	}
	k.uploadedAt.Store(k.hook.clock().UnixMilli())
	zerolog.Ctx(ctx).Debug().Int("sessions", count).Msg("Put sessions into the key backup")
	return nil
}

// isRefusedUpload says that the server does not take what is in a request, and will not later.
func isRefusedUpload(err error) bool {
	var httpError mautrix.HTTPError
	return errors.As(err, &httpError) && (httpError.IsStatus(http.StatusBadRequest) || httpError.IsStatus(http.StatusRequestEntityTooLarge))
}

// mayBeRoomID says whether a text may be a room's ID. What it is in a room key is for its sender to choose.
func mayBeRoomID(roomID id.RoomID) bool {
	text := roomID.String()
	return strings.HasPrefix(text, "!") && len(text) <= longestRoomID && utf8.ValidString(text) && !strings.ContainsFunc(text, unicode.IsControl)
}

// encrypt makes the backup's entry of a session. A session that cannot be read is damage: see [unitOfWork.GetGroupSession].
func (k *backupKeeper) encrypt(s *waitingSession) (*mautrix.ReqKeyBackupData, error) {
	internal := olm.NewBlankInboundGroupSession()
	if err := internal.Unpickle(s.pickle, k.hook.uow.PickleKey); err != nil {
		return nil, damagedBy(k.hook.uow.DB, fmt.Errorf("the key of session %s cannot be decrypted: %w", s.sessionID, err))
	}
	first := internal.FirstKnownIndex()
	export, err := internal.Export(first)
	if err != nil {
		return nil, fmt.Errorf("failed to export session %s: %w", s.sessionID, err)
	}
	encrypted, err := backup.EncryptSessionData(k.backup.key, backup.MegolmSessionData{
		Algorithm: id.AlgorithmMegolmV1, ForwardingKeyChain: []string{}, SenderKey: s.senderKey,
		SenderClaimedKeys: backup.SenderClaimedKeys{Ed25519: s.signingKey}, SessionKey: string(export), SharedHistory: s.sharedHistory,
	})
	if err != nil {
		return nil, fmt.Errorf("failed to encrypt session %s for the backup: %w", s.sessionID, err)
	}
	data, err := json.Marshal(encrypted)
	if err != nil {
		return nil, fmt.Errorf("failed to encrypt session %s for the backup: %w", s.sessionID, err)
	}
	return &mautrix.ReqKeyBackupData{
		// A sender may begin to count where it likes, and servers have 32 bits with a sign for it. What counts is in the session.
		FirstMessageIndex: int(min(first, math.MaxInt32)),
		IsVerified:        s.proven,
		SessionData:       data,
	}, nil
}

// note has the sessions wait no longer, except those that have changed since they were read.
func (k *backupKeeper) note(ctx context.Context, sessions []*waitingSession) error {
	h := k.hook
	err := h.store.write(ctx, func(ctx context.Context) error {
		for _, session := range sessions {
			if _, err := h.store.Exec(ctx, noteBackedUpQuery, h.uow.AccountID, session.sessionID, session.pickle, k.backup.version); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("failed to note which sessions are in the backup: %w", err)
	}
	return nil
}

// waitingSession is a session that the backup does not have.
type waitingSession struct {
	sessionID  id.SessionID
	roomID     id.RoomID
	senderKey  id.SenderKey
	signingKey id.Ed25519
	// pickle is the session as it is stored, encrypted.
	pickle        []byte
	sharedHistory *bool
	// proven says that it came directly from the device that made it, and that this device is proven to be its owner's today.
	proven bool
}

const (
	// Who has two devices claim one session has nothing of it called proven.
	selectToBackUp = `
		SELECT session_id, room_id, sender_key, COALESCE(signing_key, ''), session, shared_history, EXISTS (
			SELECT 1 FROM sendertrust_session claim
			WHERE claim.session_id=held.session_id AND claim.sender_key=held.sender_key AND claim.signing_key=held.signing_key
			  AND source='direct' AND legacy_session=false AND state IN ('verification_violation', 'sender_unverified', 'sender_verified')
		) AND (SELECT COUNT(*) FROM sendertrust_claim claim WHERE claim.session_id=held.session_id AND state<>'rejected')=1
	`
	// A session whose key is gone is not among them. That of a rejected device may still be there, if another one claims it, too.
	fromToBackUp = `
		FROM crypto_megolm_inbound_session held
		WHERE account_id=$1 AND session IS NOT NULL AND NOT EXISTS (
			SELECT 1 FROM sendertrust_session claim
			WHERE claim.session_id=held.session_id AND claim.sender_key=held.sender_key AND claim.signing_key=held.signing_key AND state='rejected'
		)
	`
	// Two ranges of mautrix's index, since it does not serve the question for what is not equal.
	getToBackUpQuery = selectToBackUp + fromToBackUp + `AND key_backup_version<$2` +
		` UNION ALL ` + selectToBackUp + fromToBackUp + `AND key_backup_version>$2 LIMIT $3`
	countToBackUpQuery = `SELECT COUNT(*)` + fromToBackUp + `AND key_backup_version<$2` +
		` UNION ALL SELECT COUNT(*)` + fromToBackUp + `AND key_backup_version>$2`
	noteBackedUpQuery = `
		UPDATE crypto_megolm_inbound_session SET key_backup_version=$4 WHERE account_id=$1 AND session_id=$2 AND session=$3
	`
)

func scanToBackUp(row dbutil.Scannable) (*waitingSession, error) {
	var s waitingSession
	return &s, row.Scan(&s.sessionID, &s.roomID, &s.senderKey, &s.signingKey, &s.pickle, &s.sharedHistory, &s.proven)
}

// toBackUp gives some of the sessions that a version of the backup does not have.
func (s *store) toBackUp(ctx context.Context, accountID string, version id.KeyBackupVersion, limit int) ([]*waitingSession, error) {
	rows, err := s.Query(ctx, getToBackUpQuery, accountID, version, limit)
	list, err := dbutil.NewRowIterWithError(rows, scanToBackUp, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read which sessions are to be backed up: %w", err)
	}
	return list, nil
}

// countToBackUp gives how many sessions a version of the backup does not have.
func (s *store) countToBackUp(ctx context.Context, accountID string, version id.KeyBackupVersion) (count int, err error) {
	rows, err := s.Query(ctx, countToBackUpQuery, accountID, version)
	counts, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[int], err).AsList()
	if err != nil {
		return 0, fmt.Errorf("failed to count the sessions that are to be backed up: %w", err)
	}
	for _, some := range counts {
		count += some
	}
	return count, nil
}

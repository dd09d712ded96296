-- What became of the tasks of a user's session, where its issuer's silence counts: 'held' they go on, 'lapsed' they are suspended,
-- 'returning' they are being let go on, since the issuer has spoken of the session again.
ALTER TABLE user_sessions ADD COLUMN lease TEXT NOT NULL DEFAULT 'held';

CREATE INDEX user_sessions_unlapsed ON user_sessions (issuer, confirmed_at) WHERE lease <> 'lapsed';
CREATE INDEX user_sessions_returning ON user_sessions (issuer, confirmed_at) WHERE lease = 'returning';
